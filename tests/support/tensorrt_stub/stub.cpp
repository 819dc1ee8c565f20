// A TensorRT and a CUDA that run on any CPU, for examples/tensorrt_cpp.
//
// An engine is a line of text: TYPE LAYOUT BATCH MOST SIDE CLASSES GRAPH INPUT, such as
// "float nchw -1 8 16 5 graph images"; BATCH is -1 where it is free, GRAPH is "nograph" for an engine
// that cannot be captured. It writes each batch that it is given to the file $STUB_INPUTS and
// answers with the first values of each picture as logits. Work goes through the stream in order:
// it runs when somebody waits or, while the stream is captured, when the graph is launched.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

using Work = std::vector<std::function<void()>>;
struct CUstream_st {
    Work queued, captured;
    bool capturing = false, broken = false;
};
struct CUgraph_st {
    Work work;
};
struct CUgraphExec_st {
    Work work;
};

namespace {

int alive = 0;
struct AtEnd {
    ~AtEnd() {
        if (alive != 0) std::fprintf(stderr, "stub: %d things were not freed\n", alive);
    }
} atEnd;

struct Plan {
    std::string type, layout, graph, input;
    long batch = 0, most = 0, side = 0, classes = 0;
} plan;
long batch = 0;
void *given = nullptr, *found = nullptr;

bool isInput(char const* name) { return plan.input == name; }
bool isOutput(char const* name) { return std::string("logits") == name; }

nvinfer1::Dims shapeOf(char const* name, long count) {
    nvinfer1::Dims shape{};
    if (isOutput(name)) {
        shape.nbDims = 2;
        shape.d[0] = count, shape.d[1] = plan.classes;
        return shape;
    }
    bool const last = plan.layout == "nhwc";
    shape.nbDims = 4;
    shape.d[0] = count, shape.d[1] = last ? plan.side : 3, shape.d[2] = plan.side;
    shape.d[3] = last ? 3 : plan.side;
    return shape;
}

void compute() {
    std::size_t const values = std::size_t(3 * plan.side * plan.side), count = std::size_t(batch);
    std::size_t const size = plan.type == "float" ? sizeof(float) : 1;
    if (char const* path = std::getenv("STUB_INPUTS")) {
        std::ofstream file(path, std::ios::binary | std::ios::app);
        file.write(static_cast<char const*>(given), std::streamsize(count * values * size));
    }
    for (std::size_t i = 0; i < count; ++i)
        for (std::size_t k = 0; k < std::size_t(plan.classes); ++k) {
            std::size_t const at = i * values + k;
            static_cast<float*>(found)[i * std::size_t(plan.classes) + k] =
                size == 1 ? static_cast<unsigned char*>(given)[at] : static_cast<float*>(given)[at];
        }
}

void put(cudaStream_t stream, std::function<void()> work) {
    (stream->capturing ? stream->captured : stream->queued).push_back(std::move(work));
}

}  // namespace

namespace nvinfer1 {
bool IExecutionContext::setInputShape(char const* name, Dims const& dims) noexcept {
    if (!isInput(name) || dims.d[0] < 1 || dims.d[0] > plan.most) return false;
    batch = long(dims.d[0]);
    return true;
}
Dims IExecutionContext::getTensorShape(char const* name) const noexcept {
    return shapeOf(name, batch);
}
bool IExecutionContext::setTensorAddress(char const* name, void* data) noexcept {
    (isInput(name) ? given : found) = data;
    return isInput(name) || isOutput(name);
}
bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
    if (stream->capturing && plan.graph == "nograph") {
        stream->broken = true;
        return false;
    }
    if (given == nullptr || found == nullptr || batch < 1) return false;
    put(stream, compute);
    return true;
}
IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy) noexcept {
    return new IExecutionContext;
}
Dims ICudaEngine::getTensorShape(char const* name) const noexcept {
    return shapeOf(name, plan.batch);
}
DataType ICudaEngine::getTensorDataType(char const* name) const noexcept {
    return isInput(name) && plan.type == "uint8" ? DataType::kUINT8 : DataType::kFLOAT;
}
TensorIOMode ICudaEngine::getTensorIOMode(char const* name) const noexcept {
    if (isInput(name)) return TensorIOMode::kINPUT;
    return isOutput(name) ? TensorIOMode::kOUTPUT : TensorIOMode::kNONE;
}
Dims ICudaEngine::getProfileShape(char const* name, int32_t, OptProfileSelector select) const noexcept {
    return shapeOf(name, select == OptProfileSelector::kMAX ? plan.most : 1);
}
ICudaEngine* IRuntime::deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
    std::istringstream text(std::string(static_cast<char const*>(blob), size));
    plan = {};
    text >> plan.type >> plan.layout >> plan.batch >> plan.most >> plan.side >> plan.classes >>
        plan.graph >> plan.input;
    batch = plan.batch;
    return text ? new ICudaEngine : nullptr;
}
}  // namespace nvinfer1

extern "C" {
void* createInferRuntime_INTERNAL(void*, int32_t) noexcept { return new nvinfer1::IRuntime; }

char const* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureInvalidated ? "capture invalidated" : "another error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMalloc(void** address, std::size_t size) {
    *address = std::malloc(size);
    ++alive;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** address, std::size_t size) { return cudaMalloc(address, size); }
cudaError_t cudaFree(void* address) {
    std::free(address);
    --alive;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) { return cudaFree(address); }
cudaError_t cudaMemcpyAsync(void* to, void const* from, std::size_t count, cudaMemcpyKind,
                            cudaStream_t stream) {
    put(stream, [=] { std::memcpy(to, from, count); });
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
    *stream = new CUstream_st;
    ++alive;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    --alive;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream->capturing) return cudaErrorInvalidValue;
    for (auto const& work : stream->queued) work();
    stream->queued.clear();
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->capturing = true;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    stream->capturing = false;
    if (stream->broken) return cudaErrorStreamCaptureInvalidated;
    *graph = new CUgraph_st{stream->captured};
    ++alive;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
    *executable = new CUgraphExec_st{graph->work};
    ++alive;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    --alive;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    for (auto const& work : executable->work) put(stream, work);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    --alive;
    return cudaSuccess;
}
}
