"""A network of every task goes the whole way: rewritten, saved, quantized, exported, read back."""

import functools
from collections.abc import Generator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from every_task import CLASSES, SIDE, network_for, photos
from quantized import run, section, sqnr
from torch import Tensor

from care_compress.errors import CheckpointError
from care_compress.evaluate.agreement import REQUANTIZED_BITS, Rounded, compare_answers
from care_compress.export.form import form_for, in_form
from care_compress.export.half import write_half
from care_compress.export.ort_channels_last import put_channels_last
from care_compress.export.ort_products import use_integer_products
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import float_graph, put_integers, write_onnx
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import load_quantized, save_quantized
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import PtqJob, planned, quantize_network
from care_compress.quantize.retarget import float_network, retarget
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection, RewriteSection
from care_compress.recipe.target import load_target
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.tasks.known import TASKS
from care_compress.train.stage import starting_point

EVERY = pytest.mark.parametrize("name", TASKS)
DENSE = pytest.mark.parametrize("name", ["segmentation", "detection"])  # tests/export has the rest
SHAPES = {
    "classification": (CLASSES,),
    "segmentation": (CLASSES, SIDE // 4, SIDE // 4),
    "detection": (4 + CLASSES, 8 * 8 + 4 * 4 + 2 * 2),
}
KEPT = RewriteSection(fold_norms=False)
CHOSEN = section({"role": "head", "input": "float"}, bias_correction=False)
LOOKED_AT = photos(4, seed=9)


@EVERY
@pytest.mark.parametrize("rewrites", [RewriteSection(), KEPT], ids=["all", "norms kept"])
def test_a_rewritten_network_answers_the_same(name: str, rewrites: RewriteSection) -> None:
    model, images = network_for(name).double(), photos(2).double()
    with torch.no_grad():
        expected, found = model(images), rewrite(model, rewrites)(images)
    assert expected.shape[1:] == SHAPES[name]
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "it looks at its images"


@EVERY
def test_a_checkpoint_is_known_by_its_head(name: str, tmp_path: Path) -> None:
    model, path = network_for(name), tmp_path / "model.safetensors"
    save_checkpoint(model, path, {})
    for arch in (None, "care_nano"):
        loaded = load_checkpoint(path, arch)
        assert type(loaded) is TASKS[name].kind and loaded.task == name
        assert (loaded.arch, loaded.num_classes) == ("care_nano", CLASSES)
        state = model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    with pytest.raises(CheckpointError):
        load_checkpoint(path, "care_s0")


@DENSE
def test_a_network_begins_with_the_stages_of_a_classifier(name: str, tmp_path: Path) -> None:
    classifier, path = network_for("classification"), tmp_path / "classifier.safetensors"
    save_checkpoint(classifier, path, {})
    recipe = load_recipe("fp32_shapes", [f"task={name}", f"model.backbone={path}"])
    model = starting_point(recipe, CLASSES).eval()
    assert type(model) is TASKS[name].kind and model.num_classes == CLASSES
    with torch.no_grad():
        pairs = zip(
            model.forward_features(photos(1)), classifier.forward_features(photos(1)), strict=True
        )
    assert all(torch.equal(one, other) for one, other in pairs)


def calibration() -> Generator[Tensor]:
    yield photos(8)


@functools.cache
def quantized_for(name: str) -> tuple[QuantizedCare, ir.Model, Tensor, float]:
    """The quantized network of a task, its graph, its answers, and how exact those can be."""

    network = rewrite(network_for(name), KEPT)
    model = quantize_network(PtqJob(network, SIDE, 0, calibration), CHOSEN).model
    skeleton, _ = planned(network, CHOSEN, SIDE)
    graph = float_graph(float_network(model, skeleton), SIDE)
    put_integers(graph, model)
    with torch.no_grad():
        simulated = model(LOOKED_AT)
        exact_db = sqnr(Rounded(model, REQUANTIZED_BITS)(LOOKED_AT), simulated)
    return model, graph, simulated, exact_db


@DENSE
def test_the_graph_computes_what_was_simulated(name: str) -> None:
    model, graph, simulated, exact_db = quantized_for(name)
    with torch.no_grad():
        exact = network_for(name)(LOOKED_AT)
    assert simulated.shape == exact.shape and model.task == name
    near = compare_answers(TASKS[name], simulated, run(graph, LOOKED_AT), exact_db)
    assert near.holds and near.images == len(LOOKED_AT)
    assert 5 < sqnr(simulated, exact) < exact_db, "it is quantized, and still the network"


@DENSE
def test_a_file_says_its_task_and_agrees_with_its_model(name: str, tmp_path: Path) -> None:
    model, graph, simulated, exact_db = quantized_for(name)
    names = tuple(f"c{place}" for place in range(CLASSES))
    prepared = Preprocessing.of(DataSection(resolution=SIDE), letterbox=True)
    path = tmp_path / "int8.onnx"
    write_onnx(graph, About("a recipe", "f" * 64, names, prepared, task=name), path, model)
    predict = OnnxPredictor(path)
    assert (predict.task, predict.num_classes) == (name, CLASSES)
    found = predict(LOOKED_AT)
    assert found.shape == simulated.shape
    assert compare_answers(TASKS[name], simulated, found, exact_db).holds
    apart = compare_answers(TASKS[name], simulated, found.flip(0), exact_db)
    assert not apart.holds, "other images, other answers"


@DENSE
def test_a_saved_quantized_model_keeps_its_task(name: str, tmp_path: Path) -> None:
    model, path = quantized_for(name)[0], tmp_path / "model.safetensors"
    save_quantized(model, CHOSEN, KEPT, path)
    loaded = load_quantized(path)
    assert (loaded.task, loaded.num_classes) == (name, CLASSES)
    with torch.no_grad():
        assert torch.equal(loaded(photos(2)), model(photos(2)))


@DENSE
def test_predictions_in_integers_answer_under_the_same_name(name: str) -> None:
    """As the naive recipes have them; those of masks are the last operation of the graph."""
    everything = section(bias_correction=False, covariance=False)
    target, network = load_target("onnxruntime-cpu"), rewrite(network_for(name), KEPT)
    whole = quantize_network(PtqJob(network, SIDE, 0, calibration), everything).model
    skeleton, _ = planned(network, everything, SIDE)
    inner = float_network(whole, skeleton)
    model = retarget(whole, inner, everything.rules, target)
    graph = float_graph(in_form(inner, form_for(target, model.plan)), SIDE)
    put_integers(graph, model)
    use_integer_products(graph)
    put_channels_last(graph)
    assert [value.name for value in graph.graph.outputs] == ["logits"]
    made = {node.name: node.op_type for node in graph.graph}
    assert "MatMulIntegerToFloat" in {made.get(f"{site}/product") for site in last_sites(name)}
    with torch.no_grad():
        exact_db = sqnr(Rounded(model, REQUANTIZED_BITS)(LOOKED_AT), model(LOOKED_AT))
        near = compare_answers(TASKS[name], model(LOOKED_AT), run(graph, LOOKED_AT), exact_db)
    assert near.holds


def last_sites(name: str) -> list[str]:
    """What gives out class logits."""
    every = [site for site, _ in network_for(name).named_modules() if site.startswith("dense")]
    ends = ("predict", "classes")
    return [site.replace("dense", "heads", 1) for site in every if site.endswith(ends)]


@pytest.mark.parametrize(("task", "most"), [("segmentation", 1), ("detection", 6)])
def test_half_precision_stays_half_between_the_convolutions_of_a_head(
    task: str, most: int, tmp_path: Path
) -> None:
    network = rewrite(network_for(task))
    graph = float_graph(network, SIDE)
    write_half(graph)
    # What the answer is widened by, and the three pairs that corners are decoded from.
    casts = [node for node in graph.graph if node.op_type == "Cast" and "heads" in str(node.name)]
    assert 0 < len(casts) <= most
    prepared = Preprocessing.of(DataSection(resolution=SIDE), letterbox=True)
    classes = tuple(str(one) for one in range(CLASSES))
    write_onnx(graph, About("r", "f", classes, prepared, task=task), tmp_path / "m.onnx", None)
    images = photos(2)
    found = OnnxPredictor(tmp_path / "m.onnx")(images)
    assert compare_answers(TASKS[task], network(images), found).holds
