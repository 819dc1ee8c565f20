// Classify pictures with an engine that care_deploy.py built: TensorRT 10 or 11, CUDA 12 or 13.
//
//   classify int8.engine cat.jpg dog.ppm
//   classify int8.engine --raw 1280x720 frame.rgb
//
// A picture is a JPEG (where CMake found libjpeg), a binary PPM or, after --raw, a camera's bytes:
// red, green, blue, 8 bits each, row after row. It is prepared as the evaluation does it: Pillow's
// bicubic filter to the shorter side, the middle, mean and std; all of that stands in model.h, which
// every bundle has. An engine that takes bytes (uint8) is given them as they are.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef CARE_JPEG
#include <jpeglib.h>
#endif

#include "model.h"

namespace {

struct Image {
    int width{0};
    int height{0};
    std::vector<std::uint8_t> pixels;  // row, column, channel
};

void require(bool holds, std::string const& otherwise) {
    if (!holds) throw std::runtime_error(otherwise);
}

void check(cudaError_t status) { require(status == cudaSuccess, cudaGetErrorString(status)); }

// ---- From a file to pixels -----------------------------------------------------------------------

std::vector<char> readFile(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    require(file.good(), "cannot read " + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

Image rawImage(std::vector<char> const& bytes, int width, int height, std::string const& path) {
    std::size_t const wanted = std::size_t(width) * std::size_t(height) * 3;
    require(bytes.size() == wanted, path + " has " + std::to_string(bytes.size()) + " bytes, not " +
                                        std::to_string(wanted));
    return {width, height, {bytes.begin(), bytes.end()}};
}

Image ppmImage(std::vector<char> const& bytes, std::string const& path) {
    std::size_t at = 2;  // behind "P6"
    auto const number = [&] {
        auto const isSpace = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
        while (at < bytes.size() && (isSpace(bytes[at]) || bytes[at] == '#')) {
            if (bytes[at] == '#')
                while (at < bytes.size() && bytes[at] != '\n') ++at;
            else
                ++at;
        }
        int value = 0;
        while (at < bytes.size() && bytes[at] >= '0' && bytes[at] <= '9' && value < 100'000)
            value = 10 * value + (bytes[at++] - '0');
        return value;
    };
    int const width = number(), height = number(), most = number();
    bool const usable = width > 0 && height > 0 && most == 255 && at < bytes.size();
    require(usable, path + " is no binary PPM of 8 bits");
    return rawImage({bytes.begin() + std::ptrdiff_t(at + 1), bytes.end()}, width, height, path);
}

#ifdef CARE_JPEG
// libjpeg would end the program; it may not see an exception pass, so the error jumps.
struct JpegErrors {
    jpeg_error_mgr manager;
    std::jmp_buf back;
    char text[JMSG_LENGTH_MAX];
};

void jumpBack(j_common_ptr about) {
    auto* const errors = reinterpret_cast<JpegErrors*>(about->err);
    errors->manager.format_message(about, errors->text);
    std::longjmp(errors->back, 1);
}

// Whether it could be decoded. What a jump would skip over is made by the caller.
bool decodeJpeg(std::vector<char> const& bytes, Image& image, JpegErrors& errors,
                jpeg_decompress_struct& decoder) {
    if (setjmp(errors.back) != 0) return false;
    jpeg_create_decompress(&decoder);
    jpeg_mem_src(&decoder, reinterpret_cast<unsigned char const*>(bytes.data()),
                 static_cast<unsigned long>(bytes.size()));
    jpeg_read_header(&decoder, TRUE);
    decoder.out_color_space = JCS_RGB;
    jpeg_start_decompress(&decoder);
    image.width = int(decoder.output_width);
    image.height = int(decoder.output_height);
    image.pixels.resize(std::size_t(image.width) * std::size_t(image.height) * 3);
    while (decoder.output_scanline < decoder.output_height) {
        JSAMPROW row =
            image.pixels.data() + std::size_t(decoder.output_scanline) * std::size_t(image.width) * 3;
        jpeg_read_scanlines(&decoder, &row, 1);
    }
    jpeg_finish_decompress(&decoder);
    return true;
}

Image jpegImage(std::vector<char> const& bytes, std::string const& path) {
    Image image;
    JpegErrors errors{};
    jpeg_decompress_struct decoder{};
    decoder.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = jumpBack;
    bool const decoded = decodeJpeg(bytes, image, errors, decoder);
    jpeg_destroy_decompress(&decoder);
    require(decoded, path + " cannot be decoded: " + errors.text);
    return image;
}
#else
Image jpegImage(std::vector<char> const&, std::string const& path) {
    throw std::runtime_error(path + " is a JPEG and this was built without libjpeg. Fix: "
                                    "sudo apt install libjpeg-dev, then cmake and build again");
}
#endif

Image readImage(std::string const& path, int rawWidth, int rawHeight) {
    std::vector<char> const bytes = readFile(path);
    if (rawWidth > 0) return rawImage(bytes, rawWidth, rawHeight, path);
    auto const begins = [&](char const* with) {
        return bytes.size() > 2 && std::memcmp(bytes.data(), with, 2) == 0;
    };
    if (begins("P6")) return ppmImage(bytes, path);
    require(begins("\xff\xd8"), path + " is neither a JPEG nor a binary PPM");
    return jpegImage(bytes, path);
}

// ---- From pixels to the network's input ----------------------------------------------------------

// Pillow weighs in whole numbers, 1 being this.
constexpr int kWeightBits = 22;

double bicubic(double x) {
    x = std::abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

struct Window {
    int first;
    std::vector<std::int32_t> weights;
};

// The source pixels of each destination pixel. A smaller picture widens the filter, or it would
// leave pixels out.
std::vector<Window> windows(int from, int to) {
    double const scale = double(from) / to, wide = std::max(scale, 1.0), reach = 2 * wide;
    std::vector<Window> found;
    for (int at = 0; at < to; ++at) {
        double const center = (at + 0.5) * scale;
        int const first = std::max(int(center - reach + 0.5), 0);
        int const end = std::min(int(center + reach + 0.5), from);
        std::vector<double> parts;
        double sum = 0;
        for (int i = first; i < end; ++i) {
            parts.push_back(bicubic((i - center + 0.5) / wide));
            sum += parts.back();
        }
        Window window{first, {}};
        for (double part : parts)
            window.weights.push_back(std::int32_t(std::round(part / sum * (1 << kWeightBits))));
        found.push_back(std::move(window));
    }
    return found;
}

// One direction of a resize, rounded to 8 bits as Pillow does between its two.
Image stretched(Image const& image, int to, bool across) {
    Image result{across ? to : image.width, across ? image.height : to, {}};
    result.pixels.resize(std::size_t(result.width) * std::size_t(result.height) * 3);
    std::vector<Window> const taken = windows(across ? image.width : image.height, to);
    std::size_t const step = across ? 3 : std::size_t(image.width) * 3;
    std::size_t written = 0;
    for (int y = 0; y < result.height; ++y)
        for (int x = 0; x < result.width; ++x) {
            Window const& window = taken[std::size_t(across ? x : y)];
            int const column = across ? window.first : x, row = across ? y : window.first;
            std::size_t const start =
                (std::size_t(row) * std::size_t(image.width) + std::size_t(column)) * 3;
            for (std::size_t channel = 0; channel < 3; ++channel) {
                std::int64_t sum = 1 << (kWeightBits - 1);
                for (std::size_t i = 0; i < window.weights.size(); ++i)
                    sum += std::int64_t(window.weights[i]) * image.pixels[start + i * step + channel];
                result.pixels[written++] =
                    std::uint8_t(std::clamp<std::int64_t>(sum >> kWeightBits, 0, 255));
            }
        }
    return result;
}

// The middle square that the network looks at.
Image prepared(Image image) {
    bool const tall = image.width <= image.height;
    double const longer = double(model::kResize) * (tall ? image.height : image.width);
    int const other = int(longer / (tall ? image.width : image.height));
    int const width = tall ? model::kResize : other, height = tall ? other : model::kResize;
    // Across first, as Pillow before 13 always does it; 13 begins with the height of very tall ones.
    if (image.width != width) image = stretched(image, width, true);
    if (image.height != height) image = stretched(image, height, false);
    // Halves go to the even number, as in Python.
    int const left = int(std::nearbyint((width - model::kSide) / 2.0));
    int const top = int(std::nearbyint((height - model::kSide) / 2.0));
    Image middle{model::kSide, model::kSide, {}};
    for (int y = 0; y < model::kSide; ++y) {
        auto const row = image.pixels.begin() + (std::ptrdiff_t(top + y) * width + left) * 3;
        middle.pixels.insert(middle.pixels.end(), row, row + std::ptrdiff_t(model::kSide) * 3);
    }
    return middle;
}

// ---- The engine ----------------------------------------------------------------------------------

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, char const* text) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", text);
    }
};

// Frees what CUDA gave; nothing can be thrown there, so a failure is told.
template <auto destroy>
struct Freed {
    template <class Handle>
    void operator()(Handle* handle) const {
        cudaError_t const status = destroy(handle);
        if (status != cudaSuccess) std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
    }
};
using DeviceMemory = std::unique_ptr<void, Freed<cudaFree>>;
using HostMemory = std::unique_ptr<void, Freed<cudaFreeHost>>;
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Freed<cudaStreamDestroy>>;
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, Freed<cudaGraphDestroy>>;
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Freed<cudaGraphExecDestroy>>;

DeviceMemory deviceMemory(std::size_t bytes) {
    void* address = nullptr;
    check(cudaMalloc(&address, bytes));
    return DeviceMemory(address);
}

// Pinned: only from there a copy runs beside the program and goes into a graph.
HostMemory hostMemory(std::size_t bytes) {
    void* address = nullptr;
    check(cudaMallocHost(&address, bytes));
    return HostMemory(address);
}

class Classifier {
public:
    // `most`: how many pictures there are; an engine with a free batch takes no more at once.
    Classifier(std::string const& path, std::size_t most) {
        std::vector<char> const plan = readFile(path);
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        require(runtime_ != nullptr, "no TensorRT runtime");
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        require(engine_ != nullptr, path + " was not built by this TensorRT, here");
        context_.reset(engine_->createExecutionContext());
        require(context_ != nullptr, "no memory to run the engine");
        readShapes(path, most);

        given_ = hostMemory(inBytes_);
        found_ = hostMemory(outBytes_);
        in_ = deviceMemory(inBytes_);
        out_ = deviceMemory(outBytes_);
        cudaStream_t stream{};
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        stream_.reset(stream);
        require(context_->setTensorAddress(model::kInput, in_.get()), "no place for the input");
        require(context_->setTensorAddress(model::kOutput, out_.get()), "no place for the output");
        std::memset(given_.get(), 0, inBytes_);
        capture();
    }

    std::size_t batch() const { return batch_; }

    // Put a picture in its place of the batch.
    void put(std::size_t place, Image const& middle) {
        std::size_t const plane = std::size_t(model::kSide) * model::kSide, size = 3 * plane;
        for (std::size_t i = 0; i < size; ++i) {
            std::uint8_t const value = middle.pixels[i];
            std::size_t const channel = i % 3, pixel = i / 3;
            std::size_t const at = place * size + (channelsLast_ ? i : channel * plane + pixel);
            if (takesBytes_)
                static_cast<std::uint8_t*>(given_.get())[at] = value;
            else  // in the evaluation's steps, each rounded to float32
                static_cast<float*>(given_.get())[at] =
                    (float(value) / 255.0F - model::kMean[channel]) / model::kStd[channel];
        }
    }

    // Run the batch; the logits, model::kClassCount for each picture.
    float const* run() {
        if (graph_ != nullptr)
            check(cudaGraphLaunch(graph_.get(), stream_.get()));
        else
            enqueue();
        check(cudaStreamSynchronize(stream_.get()));
        return static_cast<float const*>(found_.get());
    }

private:
    void readShapes(std::string const& path, std::size_t most) {
        using nvinfer1::DataType;
        using nvinfer1::TensorIOMode;
        bool const same = engine_->getTensorIOMode(model::kInput) == TensorIOMode::kINPUT &&
                          engine_->getTensorIOMode(model::kOutput) == TensorIOMode::kOUTPUT;
        require(same, path + " is of another model than model.h");
        DataType const type = engine_->getTensorDataType(model::kInput);
        takesBytes_ = type == DataType::kUINT8;
        require(takesBytes_ || type == DataType::kFLOAT, "the input is neither float32 nor uint8");
        require(engine_->getTensorDataType(model::kOutput) == DataType::kFLOAT,
                "the output is not float32");
        nvinfer1::Dims shape = engine_->getTensorShape(model::kInput);
        require(shape.nbDims == 4, "the input is no batch of pictures");
        channelsLast_ = shape.d[1] != 3;
        int const rows = channelsLast_ ? 1 : 2, channels = channelsLast_ ? 3 : 1;
        require(shape.d[channels] == 3 && shape.d[rows] == model::kSide &&
                    shape.d[rows + 1] == model::kSide,
                path + " takes pictures of another size than model.h says");
        if (shape.d[0] < 0) {
            auto const largest = engine_->getProfileShape(model::kInput, 0,
                                                          nvinfer1::OptProfileSelector::kMAX);
            shape.d[0] = std::min<std::int64_t>(largest.d[0], std::int64_t(most));
            require(shape.d[0] > 0 && context_->setInputShape(model::kInput, shape),
                    "the engine takes no batch of " + std::to_string(shape.d[0]));
        }
        batch_ = std::size_t(shape.d[0]);
        nvinfer1::Dims const answer = context_->getTensorShape(model::kOutput);
        require(answer.nbDims == 2 && answer.d[0] == shape.d[0] &&
                    std::size_t(answer.d[1]) == model::kClassCount,
                path + " knows other classes than model.h");
        std::size_t const value = takesBytes_ ? 1 : sizeof(float);
        inBytes_ = batch_ * 3 * std::size_t(model::kSide) * model::kSide * value;
        outBytes_ = batch_ * model::kClassCount * sizeof(float);
    }

    void enqueue() {
        cudaStream_t const stream = stream_.get();
        check(cudaMemcpyAsync(in_.get(), given_.get(), inBytes_, cudaMemcpyHostToDevice, stream));
        require(context_->enqueueV3(stream), "the engine does not run");
        check(cudaMemcpyAsync(found_.get(), out_.get(), outBytes_, cudaMemcpyDeviceToHost, stream));
    }

    // One launch for hundreds of small kernels and both copies. Without it all goes on, slower.
    void capture() {
        enqueue();  // the first run loads what a capture may not
        check(cudaStreamSynchronize(stream_.get()));
        check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
        std::string reason;
        try {
            enqueue();
        } catch (std::exception const& error) {
            reason = error.what();
        }
        cudaGraph_t captured = nullptr;
        cudaGraphExec_t executable = nullptr;
        cudaError_t status = cudaStreamEndCapture(stream_.get(), &captured);
        Graph const graph(captured);
        if (status == cudaSuccess && reason.empty())
            status = cudaGraphInstantiateWithFlags(&executable, captured, 0);
        graph_.reset(executable);
        if (graph_ != nullptr) return;
        if (reason.empty()) reason = cudaGetErrorString(status);
        status = cudaGetLastError();  // or the next call would report it again
        std::fprintf(stderr, "no CUDA graph (%s, %s): each run launches its kernels one by one\n",
                     reason.c_str(), cudaGetErrorString(status));
    }

    // Destroyed in the reverse order: the runtime has to outlive the engine, that one the context.
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    HostMemory given_, found_;
    DeviceMemory in_, out_;
    Stream stream_;
    GraphExec graph_;
    bool takesBytes_{false}, channelsLast_{false};
    std::size_t batch_{0}, inBytes_{0}, outBytes_{0};
};

void say(std::string const& path, float const* logits) {
    float const* const best = std::max_element(logits, logits + model::kClassCount);
    double sum = 0;
    for (std::size_t i = 0; i < model::kClassCount; ++i) sum += std::exp(double(logits[i]) - *best);
    std::printf("%s: %s (%.1f%%)\n", path.c_str(), model::kClasses[best - logits], 100 / sum);
}

void classify(std::string const& engine, std::vector<std::string> const& paths, int rawWidth,
              int rawHeight) {
    Classifier classifier(engine, paths.size());
    for (std::size_t first = 0; first < paths.size(); first += classifier.batch()) {
        std::size_t const count = std::min(classifier.batch(), paths.size() - first);
        // What is left of the last batch holds older pictures, whose answers nobody reads.
        for (std::size_t i = 0; i < count; ++i)
            classifier.put(i, prepared(readImage(paths[first + i], rawWidth, rawHeight)));
        float const* const logits = classifier.run();
        for (std::size_t i = 0; i < count; ++i)
            say(paths[first + i], logits + i * model::kClassCount);
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> words(argv + 1, argv + argc);
    int width = 0, height = 0;
    bool known = true;
    auto const raw = std::find(words.begin(), words.end(), "--raw");
    if (raw != words.end()) {
        known = raw + 1 != words.end() &&
                std::sscanf((raw + 1)->c_str(), "%5dx%5d", &width, &height) == 2 && width > 0 &&
                height > 0;
        if (known) words.erase(raw, raw + 2);
    }
    if (!known || words.size() < 2) {
        std::fprintf(stderr, "usage: classify ENGINE [--raw WIDTHxHEIGHT] IMAGE...\n");
        return 2;
    }
    try {
        classify(words[0], {words.begin() + 1, words.end()}, width, height);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
    return 0;
}
