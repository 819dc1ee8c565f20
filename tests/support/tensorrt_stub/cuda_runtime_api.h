// Stand-in for CUDA's header: what examples/tensorrt_cpp uses, declared as in CUDA 12 and 13.
// [[nodiscard]] is ours: a return value that nobody looks at does not compile.
#pragma once

#include <cstddef>

enum cudaError { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorStreamCaptureInvalidated = 901 };
typedef enum cudaError cudaError_t;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeThreadLocal = 1 };
typedef struct CUstream_st* cudaStream_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;
#define cudaStreamNonBlocking 0x01

extern "C" {
char const* cudaGetErrorString(cudaError_t error);
[[nodiscard]] cudaError_t cudaGetLastError();
[[nodiscard]] cudaError_t cudaMalloc(void** address, std::size_t size);
[[nodiscard]] cudaError_t cudaMallocHost(void** address, std::size_t size);
[[nodiscard]] cudaError_t cudaFree(void* address);
[[nodiscard]] cudaError_t cudaFreeHost(void* address);
[[nodiscard]] cudaError_t cudaMemcpyAsync(void* to, void const* from, std::size_t count,
                                          enum cudaMemcpyKind kind, cudaStream_t stream);
[[nodiscard]] cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags);
[[nodiscard]] cudaError_t cudaStreamDestroy(cudaStream_t stream);
[[nodiscard]] cudaError_t cudaStreamSynchronize(cudaStream_t stream);
[[nodiscard]] cudaError_t cudaStreamBeginCapture(cudaStream_t stream,
                                                 enum cudaStreamCaptureMode mode);
[[nodiscard]] cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
[[nodiscard]] cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable,
                                                        cudaGraph_t graph,
                                                        unsigned long long flags);
[[nodiscard]] cudaError_t cudaGraphDestroy(cudaGraph_t graph);
[[nodiscard]] cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
[[nodiscard]] cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
}
