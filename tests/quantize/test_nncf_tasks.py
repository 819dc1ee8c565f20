"""NNCF on networks for masks and boxes: judged by their metric, in a file that says its task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import SIDE, painted
from torch import Tensor

from care_compress.data.loader import BadImages, Batch, pixel_batches
from care_compress.model.care import Care, build_model
from care_compress.model.rewrite import rewrite
from care_compress.quantize.nncf_ptq import AccuracyControl, Calibration, quantize_openvino
from care_compress.recipe.quantize import NncfSection
from care_compress.recipe.sections import DataSection
from care_compress.runtime.artifact import open_predictor
from care_compress.tasks.known import task_called

DENSE = {"segmentation": "miou", "detection": "map50"}


def control_of(task: str, folder: Path, max_drop: float = 1.0) -> AccuracyControl:
    """Six images of one rectangle each, as pixels."""
    painted(folder, task)
    data = DataSection(source=str(folder), resolution=SIDE, workers=0)
    samples = task_called(task).samples(data, "val")
    batches = list(pixel_batches(samples, data, range(6), 4, BadImages()))
    return AccuracyControl(task_called(task), max_drop, batches, data)


def network_of(control: AccuracyControl) -> Care:
    torch.manual_seed(0)
    classes = control.task.samples(control.data, "val").classes
    return build_model("care_nano", len(classes), kind=control.task.kind).eval()


@pytest.mark.parametrize("task", DENSE)
def test_it_is_judged_by_the_metric_of_the_task(task: str, tmp_path: Path) -> None:
    control = control_of(task, tmp_path)
    model = network_of(control)

    @torch.no_grad()
    def compiled(images: Any) -> dict[str, Any]:
        return {"logits": model(torch.from_numpy(images)).numpy()}

    value, outputs = control.validate(compiled, control.items)
    assert [len(one[0]) for one in outputs] == [4, 2]

    def score(batch: Batch) -> Any:
        with torch.no_grad():
            return control.task.count(model(torch.from_numpy(control.prepare(batch))), batch)

    first, second = map(score, control.items)
    assert value == pytest.approx((first + second).metrics()[DENSE[task]])
    broken = lambda images: {"logits": float("nan") * compiled(images)["logits"]}  # noqa: E731
    assert control.validate(broken, control.items)[0] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("task", DENSE)
def test_a_model_under_control_answers_as_its_task_does(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    from care_compress.quantize import nncf_ptq

    monkeypatch.setattr(nncf_ptq, "MOST_LAYERS", 2)
    control = control_of(task, tmp_path / "images", max_drop=100.0)
    network = rewrite(network_of(control))

    def calibration() -> Any:
        for batch in control.items:
            yield torch.from_numpy(control.prepare(batch))

    path = tmp_path / "model.xml"
    images = Calibration(calibration, len(control.items))
    quantize_openvino(network, NncfSection(), False, SIDE, images, control, path)
    predict = open_predictor(str(path), torch.device("cpu"))
    x: Tensor = next(iter(calibration()))
    assert predict.task == task and predict.num_classes == network.num_classes
    assert predict(x).shape == network(x).shape
