// Stand-in for TensorRT's header: what examples/tensorrt_cpp uses, declared as in 10.3 and 11.
// [[nodiscard]] is ours: a return value that nobody looks at does not compile.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

using AsciiChar = char;

class Dims64 {
public:
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1 };

class ILogger {
public:
    enum class Severity : int32_t {
        kINTERNAL_ERROR = 0,
        kERROR = 1,
        kWARNING = 2,
        kINFO = 3,
        kVERBOSE = 4,
    };
    virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
    ILogger() = default;
    virtual ~ILogger() = default;
};

class INoCopy {
protected:
    INoCopy() = default;
    virtual ~INoCopy() = default;
    INoCopy(INoCopy const&) = delete;
    INoCopy& operator=(INoCopy const&) = delete;
};

class IExecutionContext : public INoCopy {
public:
    virtual ~IExecutionContext() noexcept = default;
    [[nodiscard]] bool setInputShape(char const* tensorName, Dims const& dims) noexcept;
    [[nodiscard]] Dims getTensorShape(char const* tensorName) const noexcept;
    [[nodiscard]] bool setTensorAddress(char const* tensorName, void* data) noexcept;
    [[nodiscard]] bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine : public INoCopy {
public:
    virtual ~ICudaEngine() noexcept = default;
    [[nodiscard]] IExecutionContext* createExecutionContext(
        ExecutionContextAllocationStrategy strategy =
            ExecutionContextAllocationStrategy::kSTATIC) noexcept;
    [[nodiscard]] Dims getTensorShape(char const* tensorName) const noexcept;
    [[nodiscard]] DataType getTensorDataType(char const* tensorName) const noexcept;
    [[nodiscard]] TensorIOMode getTensorIOMode(char const* tensorName) const noexcept;
    [[nodiscard]] Dims getProfileShape(char const* tensorName, int32_t profileIndex,
                                       OptProfileSelector select) const noexcept;
};

class IRuntime : public INoCopy {
public:
    virtual ~IRuntime() noexcept = default;
    [[nodiscard]] ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept;
};

}  // namespace nvinfer1

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept;

namespace nvinfer1 {
namespace {
[[nodiscard]] inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
    return static_cast<IRuntime*>(createInferRuntime_INTERNAL(&logger, 100300));
}
}  // namespace
}  // namespace nvinfer1
