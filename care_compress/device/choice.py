"""Which engine to use: the fastest of those that answered rightly and were measured here."""

from collections.abc import Sequence
from typing import Any

from care_compress.device.enginefile import origin_path
from care_compress.device.manifest import FLOAT, Bundle, precision_of, required_module
from care_compress.device.storage import read_json_object

_TRY = "run verify and bench to choose by accuracy and speed"


def choose_engine(bundle: Bundle, built: Sequence[str]) -> tuple[str, str]:
    """The model whose engine to use, and why it is that one.

    Only what was found of the very engines that lie here counts.
    """
    found = {model: _found_of(bundle, model) for model in built}
    passed = {model: _part(one, "accuracy").get("passed") for model, one in found.items()}
    speeds = {}
    for model in built:
        speed = _part(found[model], "speed")
        p50 = _part(speed, "latency_ms").get("p50")
        if passed[model] is True and isinstance(p50, float):
            speeds[model] = p50 / speed["batch"]
    if speeds:
        model = min(speeds, key=lambda one: speeds[one])
        told = f"{speeds[model]:.3f} ms for an image"
        others = len(speeds) - 1
        return model, f"it passed verify and is the fastest of {others + 1} that did: {told}"
    if right := [model for model in built if passed[model] is True]:
        return right[0], f"it passed verify, and bench has not timed it; {_TRY}"
    if untried := [model for model in built if passed[model] is None]:
        # What the bundle is for, where nothing speaks against it. TensorRT for RTX knows INT8 for
        # the weights of matrix products alone, and float16 is what it runs fastest.
        is_rtx = required_module(str(bundle.manifest["requirement"])) == "tensorrt_rtx"
        wanted = [one for one in untried if (precision_of(one) == FLOAT) == is_rtx]
        model = (wanted or untried)[0]
        return model, f"no engine here has passed verify yet; {_TRY}"
    return built[0], "every engine here FAILED verify: do not trust its answers"


def _found_of(bundle: Bundle, model: str) -> dict[str, Any]:
    """What results.json says of the engine that lies here."""
    models = _part(read_json_object(bundle.results) or {}, "models")
    found, about = _part(models, model), read_json_object(origin_path(bundle.engine(model))) or {}
    return found if found.get("engine_sha256") == about.get("engine_sha256") else {}


def _part(value: dict[str, Any], key: str) -> dict[str, Any]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}
