"""NNCF's accuracy control: layers return to float until the budget holds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_nncf import CPU, DATA, calibration, items, network, quantizers  # noqa: F401 (fixtures)

from care_compress.data.loader import Batch
from care_compress.model.compact import CompactCare
from care_compress.quantize import nncf_ptq as nncf_backend
from care_compress.quantize.nncf_ptq import AccuracyControl, Calibration, quantize_openvino
from care_compress.recipe.quantize import NncfSection
from care_compress.runtime.artifact import open_predictor
from care_compress.tasks.known import task_called

pytest.importorskip("nncf")


class Worse(AccuracyControl):
    """Scores of 100 for the float network, which is seen first, and 90 for every other one.

    As they come, an integer network may be the better one on a few images, and nothing returns.
    """

    def validate(
        self,
        compiled: Any,
        items: Iterable[Batch],  # noqa: F811
    ) -> tuple[float, list[list[NDArray[np.float32]]]]:
        """Real answers, by which NNCF ranks the layers."""
        whole = self.__dict__.setdefault("whole", [compiled])
        return 100.0 if compiled is whole[0] else 90.0, super().validate(compiled, items)[1]


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
    for name, max_drop in (("easy", 20.0), ("impossible", 5.0)):
        path = tmp_path / name / "model.xml"
        control = Worse(task_called("classification"), max_drop, items, DATA)
        quantize_openvino(network, NncfSection(), False, 64, calibration, control, path)
        found[name] = quantizers(path)
        assert open_predictor(str(path), CPU)(torch.zeros(1, 3, 64, 64)).shape == (1, 40)
    assert 0 < found["impossible"] < found["easy"]
