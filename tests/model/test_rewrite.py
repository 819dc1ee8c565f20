import copy
import functools
from collections.abc import Callable

import pytest
import torch
from reference import golden_input, published_model, relative_error
from torch import Tensor, nn

import care_compress
from care_compress.errors import CareError
from care_compress.libraries import openvino_core
from care_compress.model.care import Care
from care_compress.model.compact import CompactCare, PooledDepthwise
from care_compress.model.rewrite import REWRITES, rewrite_in_steps
from care_compress.recipe.sections import RewriteSection

SIZES = [(96, 96), (97, 131), (33, 47)]  # odd sizes reach the borders of the 2x2 and the 3x3
ALL = "all together"


@pytest.fixture(scope="module")
def s0() -> Care:
    return published_model("care_s0")


def only(name: str) -> RewriteSection:
    return RewriteSection(**{other: name in (other, ALL) for other in REWRITES})


Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def published(s0: Care) -> Pair:
    """The network in float32 and in float64."""
    return s0, copy.deepcopy(s0).double()


@pytest.fixture(scope="module", params=[*REWRITES, ALL])
def rewritten(request: pytest.FixtureRequest, published: Pair) -> Pair:
    """Both after one rewrite, or all."""
    plain, double = published
    return tuple(care_compress.rewrite(model, only(request.param)) for model in (plain, double))


@pytest.fixture(scope="module")
def expected(published: Pair) -> Callable[[tuple[int, int]], tuple[Tensor, Tensor]]:
    """What both answer to images of a size."""
    return functools.cache(lambda size: answers(published, size))


def answers(pair: Pair, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    (plain, double), images = pair, golden_input(*size)
    with torch.no_grad():
        return plain(images), double(images.double())


@pytest.mark.parametrize("size", SIZES)
def test_each_rewrite_is_exact(
    rewritten: Pair,
    expected: Callable[[tuple[int, int]], tuple[Tensor, Tensor]],
    size: tuple[int, int],
) -> None:
    (plain, double), (wanted, exact) = answers(rewritten, size), expected(size)
    assert relative_error(double, exact) < 1e-12
    assert relative_error(plain, wanted) < 1e-5


@pytest.mark.parametrize("arch", ["care_s1", "care_s2", "care_nano"])
def test_other_sizes_are_exact_too(arch: str) -> None:
    model = care_compress.build_model(arch, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.1, 3)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    model.double().eval()
    images = golden_input(65, 70).double()
    with torch.no_grad():
        assert relative_error(care_compress.rewrite(model)(images), model(images)) < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1), (3, 4)])
def test_pooled_depthwise_is_exact_on_tiny_maps(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(PooledDepthwise(conv)(x), conv(x).mean(dim=(2, 3)))


def test_the_original_is_left_alone(s0: Care) -> None:
    before = {name: tensor.clone() for name, tensor in s0.state_dict().items()}
    compact = care_compress.rewrite(s0)
    for parameter in compact.parameters():
        parameter.data.add_(1.0)
    after = s0.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in s0.parameters())


def test_steps_show_what_each_rewrite_saves(s0: Care) -> None:
    compact, steps = rewrite_in_steps(s0, RewriteSection(), 96)
    assert [step.name for step in steps] == ["published", *REWRITES]
    cost = {step.name: step.cost for step in steps}
    published, last = cost["published"], cost["fuse_normaliser"]
    assert cost["merge_heads"].parameters < 0.87 * published.parameters  # 14 % of S0
    assert cost["fold_norms"].operations < cost["fold_stem"].operations
    assert last.macs < published.macs and last.operations < published.operations
    assert last.parameters == sum(p.numel() for p in compact.parameters())


def test_switches_are_respected(s0: Care) -> None:
    kept = care_compress.rewrite(s0, RewriteSection(fold_norms=False))
    norms = [name for name, module in kept.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 2 * 18 + 3, "two per block and one per downsample"
    assert not any(
        isinstance(module, nn.BatchNorm2d) for module in care_compress.rewrite(s0).modules()
    )


def test_stage_features_stay_reachable_unless_pooled(s0: Care) -> None:
    images = golden_input(64, 64)
    features = care_compress.rewrite(s0, only("fold_norms")).forward_features(images)
    with torch.no_grad():
        for found, expected in zip(features, s0.forward_features(images), strict=True):
            assert relative_error(found, expected) < 1e-5
    with pytest.raises(CareError, match="pool_last_depthwise"):
        care_compress.rewrite(s0).forward_features(images)


def test_only_a_float_care_can_be_rewritten(s0: Care) -> None:
    with pytest.raises(CareError, match="CompactCare"):
        care_compress.rewrite(care_compress.rewrite(s0))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The rewritten network as ONNX, with a dynamic batch."""
    model: CompactCare = care_compress.rewrite(care_compress.build_model("care_nano", 10))
    path = str(tmp_path_factory.mktemp("export") / "compact.onnx")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        model.eval(),
        (torch.randn(2, 3, 64, 64),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert program is not None
    program.save(path)
    return path


def test_exports_with_a_dynamic_batch_and_without_splits(exported: str) -> None:
    import onnx

    operations = {node.op_type for node in onnx.load(exported).graph.node}
    assert not operations & {"Split", "SplitToSequence", "SequenceAt", "If", "Loop", "NonZero"}


def test_a_plain_nncf_pass_over_the_export_compiles_in_openvino(exported: str) -> None:
    pytest.importorskip("openvino", reason="needs the openvino extra")
    nncf = pytest.importorskip("nncf", reason="needs the openvino extra")
    import numpy as np

    core = openvino_core()
    model = core.read_model(exported)
    model.reshape([2, 3, 64, 64])
    images = [
        np.random.default_rng(i).standard_normal((2, 3, 64, 64), np.float32) for i in range(2)
    ]
    quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=2)
    logits = core.compile_model(quantized, "CPU")(images[0])[0]
    assert np.isfinite(logits).all()
