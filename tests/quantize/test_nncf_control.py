"""NNCF's accuracy control: layers return to float until the budget holds."""

from pathlib import Path

import pytest
import torch
from test_nncf import CPU, DATA, calibration, items, network, quantizers  # noqa: F401 (fixtures)

from care_compress.data.loader import Batch
from care_compress.model.compact import CompactCare
from care_compress.quantize import nncf_ptq as nncf_backend
from care_compress.quantize.nncf_ptq import AccuracyControl, Calibration, quantize_openvino
from care_compress.recipe.quantize import NncfSection
from care_compress.runtime.artifact import open_predictor
from care_compress.tasks.known import task_called

pytest.importorskip("nncf")


@pytest.mark.slow
def test_accuracy_control_returns_layers_to_float_and_always_ends_with_a_model(
    network: CompactCare,  # noqa: F811
    calibration: Calibration,  # noqa: F811
    items: list[Batch],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nncf_backend, "MOST_LAYERS", 3)
    found = {}
    for name, max_drop in (("easy", 100.0), ("impossible", -200.0)):
        path = tmp_path / name / "model.xml"
        control = AccuracyControl(task_called("classification"), max_drop, items, DATA)
        quantize_openvino(network, NncfSection(), False, 64, calibration, control, path)
        found[name] = quantizers(path)
        assert open_predictor(str(path), CPU)(torch.zeros(1, 3, 64, 64)).shape == (1, 40)
    assert 0 < found["impossible"] < found["easy"]
