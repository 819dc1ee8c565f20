"""What can go wrong on the device, each with what to do about it."""


class DeployError(Exception):
    """Base of every error whose cause lies in the device, the bundle or what was asked."""

    exit_code = 2

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}" if self.fix else self.message


class TensorRtMissingError(DeployError):
    """TensorRT is not installed, does not load, or is a version this bundle cannot use."""


class NoGpuError(DeployError):
    """No CUDA runtime, no GPU, or the GPU reported an error."""


class EngineMismatchError(DeployError):
    """An engine built from another graph, by another TensorRT, or for another GPU."""


class BundleDamagedError(DeployError):
    """A file of the bundle is missing, changed, or points out of its folder."""


class WrongBundleError(DeployError):
    """A bundle for another runtime than this script serves."""


class RuntimeMissingError(DeployError):
    """A CPU's runtime is not installed, does not load, or is a version this bundle cannot use."""


class ProcessorError(DeployError):
    """A processor, or a system on it, that files of the bundle are not for."""


class ModelError(DeployError):
    """A file that its runtime does not load or run."""


class UntypedModelError(DeployError):
    """An ONNX graph TensorRT cannot parse, or whose types are not those it claims."""


class BuildFailedError(DeployError):
    """TensorRT took the graph and gave no engine."""


class ImageError(DeployError):
    """An image that cannot be read, or no library to read it with."""


class VerificationError(DeployError):
    """The model runs and its answers are wrong."""

    exit_code = 1
