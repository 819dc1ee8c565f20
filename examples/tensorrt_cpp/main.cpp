// Classify one image with an engine that care_deploy.py built: TensorRT 10 or 11, no other library.
//
//   classify int8.engine image.f32
//
// image.f32 holds the normalized pixels as raw float32 in the order channel, row, column; README
// says how to write one. Prints the five likeliest classes by number.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, char const* text) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", text);
    }
};

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

std::vector<char> readFile(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

struct DeviceBuffer {
    explicit DeviceBuffer(std::size_t bytes) { check(cudaMalloc(&address, bytes)); }
    ~DeviceBuffer() { cudaFree(address); }
    DeviceBuffer(DeviceBuffer const&) = delete;
    DeviceBuffer& operator=(DeviceBuffer const&) = delete;
    void* address{nullptr};
};

struct Stream {
    Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(handle); }
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;
    cudaStream_t handle{};
};

std::size_t elements(nvinfer1::ICudaEngine const& engine, char const* name) {
    if (engine.getTensorDataType(name) != nvinfer1::DataType::kFLOAT)
        throw std::runtime_error(std::string(name) + " is not float32");
    nvinfer1::Dims const shape = engine.getTensorShape(name);
    std::size_t count = 1;
    for (int i = 0; i < shape.nbDims; ++i) {
        // An open batch would also need setInputShape; care-compress exports batch 1 for boards.
        if (shape.d[i] < 1) throw std::runtime_error("the engine's shapes are not fixed");
        count *= static_cast<std::size_t>(shape.d[i]);
    }
    return count;
}

void printBest(std::vector<float> const& logits) {
    float const highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (float logit : logits) sum += std::exp(double(logit) - highest);
    std::vector<int> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    auto const shown = order.begin() + std::min<std::ptrdiff_t>(5, order.end() - order.begin());
    std::partial_sort(order.begin(), shown, order.end(),
                      [&](int a, int b) { return logits[a] > logits[b]; });
    for (auto it = order.begin(); it != shown; ++it)
        std::printf("%5.1f %%  class %d\n", 100 * std::exp(double(logits[*it]) - highest) / sum, *it);
}

void classify(std::string const& enginePath, std::string const& imagePath) {
    Logger logger;
    std::vector<char> const plan = readFile(enginePath);
    // Destroyed in the reverse order: the runtime has to outlive the engine, that one the context.
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    if (!runtime) throw std::runtime_error("no TensorRT runtime");
    std::unique_ptr<nvinfer1::ICudaEngine> engine(
        runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) throw std::runtime_error(enginePath + " was not built by this TensorRT, here");
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
    if (!context) throw std::runtime_error("no memory to run the engine");
    if (engine->getNbIOTensors() != 2) throw std::runtime_error("the engine is no classifier");

    bool const inputFirst =
        engine->getTensorIOMode(engine->getIOTensorName(0)) == nvinfer1::TensorIOMode::kINPUT;
    char const* const input = engine->getIOTensorName(inputFirst ? 0 : 1);
    char const* const output = engine->getIOTensorName(inputFirst ? 1 : 0);

    std::vector<char> const pixels = readFile(imagePath);
    std::size_t const bytes = elements(*engine, input) * sizeof(float);
    if (pixels.size() != bytes)
        throw std::runtime_error(imagePath + " has " + std::to_string(pixels.size()) +
                                 " bytes, the engine takes " + std::to_string(bytes));
    std::vector<float> logits(elements(*engine, output));

    Stream stream;
    DeviceBuffer in(bytes), out(logits.size() * sizeof(float));
    context->setTensorAddress(input, in.address);
    context->setTensorAddress(output, out.address);
    check(cudaMemcpyAsync(in.address, pixels.data(), bytes, cudaMemcpyHostToDevice, stream.handle));
    if (!context->enqueueV3(stream.handle)) throw std::runtime_error("the engine does not run");
    check(cudaMemcpyAsync(logits.data(), out.address, logits.size() * sizeof(float),
                          cudaMemcpyDeviceToHost, stream.handle));
    check(cudaStreamSynchronize(stream.handle));
    printBest(logits);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: classify ENGINE IMAGE.f32\n");
        return 2;
    }
    try {
        classify(argv[1], argv[2]);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
    return 0;
}
