"""What a processor means for INT8, in one line, and what may hide its instructions.

Factors are those of CARE-S0 at 224, one image, one thread (docs/PERFORMANCE.md); where none was
measured the line says so.
"""

from collections.abc import Mapping

from care_compress.device.processor import ISA_LIMITS, LIMITS_WITHOUT_DOT_PRODUCTS
from care_compress.machine import Cpu

_NO_LIMIT = ("DEFAULT", "ALL")

_RIGHT = "files of CPU targets are right here (weights of 7 bits)"


def int8_line(cpu: Cpu) -> str:
    """What to expect of INT8 on this processor."""
    has = {name for name, present in cpu.features.items() if present}
    if cpu.dot_products is None:
        return (
            "INT8: what this processor has for it cannot be read. Files of CPU targets are right "
            "on every processor; what they gain here, only compare can tell."
        )
    if "asimddp" in cpu.features:
        return _on_arm(has)
    if "amx_int8" in has:
        rival = (
            "BF16, which has tiles too, is what it must beat" if "amx_bf16" in has else "no BF16"
        )
        return (
            f"INT8: matrix tiles and dot products (AMX): INT8 should pay (not measured); {rival}."
        )
    if cpu.dot_products:
        gain = (
            "about 2x of FP32 and 1.3x of BF16 in OpenVINO, 1.4x of FP32 in ONNX Runtime"
            if "avx512_bf16" in has
            else "in OpenVINO more than in ONNX Runtime (not measured without BF16)"
        )
        return f"INT8: integer dot products (VNNI): INT8 pays most here, {gain}."
    if "avx2" in has:
        return (
            f"INT8: no integer dot products: {_RIGHT}; expect about 1.5 to 1.7x of FP32 in "
            "OpenVINO, 1.1 to 1.3x in ONNX Runtime; full-range files are refused."
        )
    return f"INT8: neither dot products nor AVX2: expect no gain (not measured); {_RIGHT}."


def _on_arm(has: set[str]) -> str:
    if "asimddp" not in has:
        return f"INT8: no integer dot products: expect little gain (not measured); {_RIGHT}."
    also = " and matrix products (I8MM)" if "i8mm" in has else ""
    return f"INT8: integer dot products (SDOT){also}: INT8 should pay (not measured)."


def isa_remarks(cpu: Cpu, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What a variable of the environment keeps OpenVINO from using."""
    name = next((name for name in ISA_LIMITS if environment.get(name)), None)
    # They name instructions of x86; nothing else reads them.
    if name is None or environment[name].upper() in _NO_LIMIT or "asimddp" in cpu.features:
        return ()
    limit = environment[name]
    if limit.upper() in LIMITS_WITHOUT_DOT_PRODUCTS and cpu.dot_products:
        hidden = "hides the integer dot products of this processor from OpenVINO"
    else:
        hidden = "limits what OpenVINO uses of this processor"
    return (f"{name}={limit} {hidden}: its times here are not the processor's. Unset it.",)
