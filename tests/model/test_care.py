import pytest
import torch
from reference import (
    GOLDEN,
    GOLDEN_SIZES,
    SHAPES,
    golden_input,
    published_model,
    relative_error,
)
from torch import nn
from torch.nn import functional as F

import care_compress
from care_compress.errors import CareError, InputSizeError
from care_compress.model.care import (
    ARCHITECTURES,
    Block,
    Care,
    Head,
    TokenMixer,
    build_model,
    drop_path,
    linear_attention,
    positive_features,
)
from care_compress.model.cost import measure_cost

PUBLISHED = {  # parameters, MACs at 224 (published tables, recounted)
    "care_s0": (7.34e6, 0.718e9),
    "care_s1": (9.60e6, 1.029e9),
    "care_s2": (19.48e6, 1.923e9),
}


@pytest.fixture(scope="module")
def s0() -> Care:
    return published_model("care_s0")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", GOLDEN_SIZES)
def test_golden_outputs(s0: Care, size: tuple[int, int], layout: torch.memory_format) -> None:
    key = f"{size[0]}x{size[1]}"
    images = golden_input(*size).to(memory_format=layout)
    with torch.no_grad():
        logits = s0(images)
        single = s0(images[1:])
        stages = s0.forward_features(images)
        pooled = stages[-1].mean(dim=(2, 3))
        heads = {"head": s0.head(pooled), "dist_head": s0.dist_head(pooled)}
    golden = torch.from_numpy(GOLDEN[f"{key}/logits"])
    assert relative_error(logits, golden) < 1e-5
    assert relative_error(single, golden[1:]) < 1e-5
    for name, value in heads.items():
        assert relative_error(value, torch.from_numpy(GOLDEN[f"{key}/{name}"])) < 1e-5
    for i, stage in enumerate(stages, start=1):
        found = torch.stack([stage.mean(), stage.std(), stage.abs().max()])
        expected = torch.from_numpy(GOLDEN[f"{key}/stage{i}_mean_std"])
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_published_names_load_strictly_and_counts_match(arch: str) -> None:
    model = published_model(arch)
    assert set(model.state_dict()) == set(SHAPES["CARETrans_" + arch[-2:].upper()])
    cost = measure_cost(model, 224)
    parameters, macs = PUBLISHED[arch]
    assert cost.parameters == pytest.approx(parameters, rel=2e-3)
    assert cost.macs == pytest.approx(macs, rel=2e-3)


def test_nano_is_a_whole_care_within_a_million_parameters() -> None:
    model = care_compress.build_model("care_nano")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    mixers = [m for m in model.modules() if isinstance(m, TokenMixer)]
    kinds = [mixer.head_dim is not None for mixer in mixers]
    assert len(model.stages) == 4
    assert not kinds[0] and kinds[-1], "strip convolutions early, attention late"
    assert sum(kinds) == sum(ARCHITECTURES["care_nano"].depths[2:])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_modes_and_class_count(arch: str) -> None:
    model = care_compress.build_model(arch, num_classes=7)
    images = torch.randn(2, 3, 64, 64)
    first, second = model.train()(images)
    assert first.shape == second.shape == (2, 7)
    assert model.eval()(images).shape == (2, 7)


def test_forward_features_are_the_four_strides() -> None:
    stages = (
        care_compress.build_model("care_nano").eval().forward_features(torch.randn(1, 3, 64, 96))
    )
    assert [tuple(stage.shape[2:]) for stage in stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("size", [(33, 47), (97, 131), (32, 32)])
def test_odd_sizes_work(s0: Care, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert s0(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 224, 16), (1, 1, 64, 64), (3, 64, 64)])
def test_unusable_inputs_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputSizeError, match="too small|RGB"):
        care_compress.build_model("care_nano")(torch.zeros(shape))


def test_unknown_arch_names_the_known_ones() -> None:
    with pytest.raises(CareError, match="care_s0"):
        care_compress.build_model("care_s9")


def test_positive_features_survive_where_the_textbook_form_cancels() -> None:
    t = torch.linspace(-80, 10, 500)
    exact = torch.where(t > 0, t.double() + 1, t.double().exp())
    assert relative_error((positive_features(t) / exact).double(), torch.ones(500)) < 1e-5
    assert (F.elu(t) + 1 == 0).any(), "otherwise this test proves nothing"


def _published_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The paper's formula as it is usually typed."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    kv = k.transpose(-1, -2) @ v / q.shape[-2]
    return (q @ kv) / ((q * k.mean(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_attention_is_exact_under_autocast_with_very_negative_preactivations(
    half: torch.dtype,
) -> None:
    torch.manual_seed(0)
    group, pixels = 32, 7
    mixer = TokenMixer(group, head_dim=16).eval()
    nn.init.normal_(mixer.qk.weight, std=1.0)
    # Whole tokens at every depth down to -80, the rest of the channels around them.
    with torch.no_grad():
        mixer.qk.bias.copy_(torch.linspace(-80, 2, 2 * group))
        mixer.qk.bias[:16] = -14.0  # one head's queries flush to zero in the published form
    att = torch.randn(2, group, pixels, pixels)
    with torch.no_grad():
        reference = mixer.double().attention(att.double())
        mixer = mixer.float()
        with torch.autocast("cpu", half):
            stable = mixer.attention(att)
            q, k = mixer.split_heads(mixer.qk(att), 2)
            v = att.reshape(2, 2, 16, -1).to(q.dtype)
            tokens_last = [t.transpose(-1, -2) for t in (q, k, v)]
            published = _published_attention(*tokens_last).transpose(-1, -2).reshape(att.shape)
    lowest = mixer.qk(att).min()
    assert lowest < -70
    assert stable.dtype == torch.float32 and stable.isfinite().all()
    error = (stable.double() - reference).abs() / reference.abs().amax(dim=(0, 2, 3), keepdim=True)
    assert error.max() < 0.01
    worst = (published.double() - reference).abs() / reference.abs().amax(
        dim=(0, 2, 3), keepdim=True
    )
    assert not worst.max() < 0.5, "the published form should fail here, or the test is too easy"


def test_linear_attention_equals_its_quadratic_definition() -> None:
    q, k, v = (torch.randn(2, 2, 8, 30, dtype=torch.float64) for _ in range(3))
    weights = positive_features(q).transpose(-1, -2) @ positive_features(k) / 30
    expected = (weights @ v.transpose(-1, -2)) / (weights.sum(dim=-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(linear_attention(q, k, v), expected.transpose(-1, -2))


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = drop_path(torch.ones(4000, 2, 3, 3), 0.25)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(dim=1), per_sample.amax(dim=1))
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert float(out.mean()) == pytest.approx(1, abs=0.03)


def test_drop_path_acts_only_in_training() -> None:
    model = care_compress.build_model("care_nano", num_classes=3, drop_path_rate=0.9)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    first, _ = model.train()(images)
    second, _ = model(images)
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def test_drop_path_rises_with_depth_from_nothing_to_the_rate() -> None:
    model = build_model("care_nano", 4, drop_path_rate=0.3)
    rates = [module.drop_path for module in model.modules() if isinstance(module, Block)]
    steps = [later - earlier for earlier, later in zip(rates, rates[1:], strict=False)]
    assert rates[0] == 0.0 and rates[-1] == pytest.approx(0.3)
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    out = drop_path(torch.ones(4000, 2, 3, 3), 0.25)
    per_sample = out.flatten(1)
    assert bool((per_sample == per_sample[:, :1]).all())
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(out.mean()) == pytest.approx(1, abs=0.05)


def test_the_heads_norm_has_the_published_epsilon() -> None:
    """Features that hardly differ show it: 1e-6 beside a variance of 1e-6 halves the power."""
    head = Head(2, 2)
    with torch.no_grad():
        head.fc.weight.copy_(torch.eye(2))
        head.fc.bias.zero_()
    # GELU is the identity far from zero.
    logits = head(torch.tensor([[10.001, 9.999]]))
    assert logits[0].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=2e-2)
