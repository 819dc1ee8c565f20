"""Cutting, ranking, refitting and choosing widths: the parts, on small networks."""

import contextlib
import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quantized import SIZE, care, images, section
from quantized import quantized as quantize
from rich.console import Console
from torch import Tensor

import care_compress
from care_compress.data.loader import Batch
from care_compress.errors import CareError, CheckpointError, RecipeError
from care_compress.model.care import Care, Widths
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.cost import measure_cost
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import load_quantized, save_quantized
from care_compress.quantize.ptq import PtqJob, quantize_network
from care_compress.recipe.sections import RewriteSection
from care_compress.recipe.slim import SlimBudgetSection, SlimSection
from care_compress.slim.allocate import Limit, choose_widths, choose_within_both
from care_compress.slim.cut import cut
from care_compress.slim.places import Place, bottleneck_at, find_places
from care_compress.slim.plan import (
    check_budget,
    check_slim,
    cost_of,
    hidden_limit,
    hidden_share,
    make_plan,
    print_slim_plan,
    widths_allowed,
)
from care_compress.slim.rank import by_reconstruction, by_scores, magnitude, module_aware
from care_compress.slim.refit import Normal, refit
from care_compress.slim.statistics import (
    HiddenStatistics,
    head_input,
    head_weight,
    measure_hidden,
)
from care_compress.tasks.known import task_called

TASK = task_called("classification")
NARROW = Widths((12, 24, 16, 96, 48, 200, 8), (16, 32, 64, 128, 40, 256, 72))


def batches(count: int = 24) -> list[Batch]:
    pixels = images(count)
    labels = torch.arange(count) % 5
    return [
        Batch(one, label, index)
        for one, label, index in zip(
            pixels.split(8), labels.split(8), torch.arange(count).split(8), strict=True
        )
    ]


def statistics(model: Care) -> dict[Place, HiddenStatistics]:
    return measure_hidden(TASK, model, batches(), 0, lambda done: None)


def slim(**settings: object) -> SlimSection:
    return SlimSection.model_validate_json(json.dumps({"budget": {"macs": 0.7}, **settings}))


@torch.no_grad()
def silenced(model: Care, place: Place, channels: list[int], level: float = 0.0) -> None:
    """Give channels the same value at every position, whatever the image."""
    half = bottleneck_at(model, place)
    assert half.conv.bias is not None
    half.conv.weight[channels] = 0
    half.conv.bias[channels] = level


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_cutting_channels_that_never_vary_changes_nothing(level: float) -> None:
    model = care().double()
    places = [place for place in find_places(model) if not place.last]
    gone = {place: list(range(0, place.channels, 3)) for place in places}
    for place, channels in gone.items():
        silenced(model, place, channels, level)
    kept = {
        place: [c for c in range(place.channels) if c not in set(gone[place])] for place in places
    }
    means = {
        place: torch.zeros(place.channels).double().index_fill(0, torch.tensor(cs), level)
        for place, cs in gone.items()
    }
    narrow = cut(model, kept, means)
    x = images(4).double()
    assert narrow.widths.hidden1[0] == len(kept[places[0]])
    assert (narrow(x) - model(x)).abs().max() < 1e-12 * model(x).abs().max()


@pytest.mark.parametrize("branch", ["inter1", "inter2"])
def test_taking_out_an_interaction_that_never_varies_changes_nothing(branch: str) -> None:
    model = care().double()
    gone = [place for place in find_places(model) if place.branch == branch and not place.last]
    means = {}
    for place in gone:
        silenced(model, place, list(range(place.channels)), 0.4)
        means[place] = torch.full((place.channels,), 0.4, dtype=torch.float64)
        half = bottleneck_at(model, place)
        if branch == "inter2":  # what it adds to the memory has no other place to go
            assert half.fc2 is not None and half.fc2.bias is not None
            with torch.no_grad():
                memory = half.fc2.out_channels // 4
                half.fc2.weight[:memory] = 0
                half.fc2.bias[:memory] = 0
    narrow = cut(model, {place: [] for place in gone}, means)
    widths = narrow.widths.hidden1 if branch == "inter1" else narrow.widths.hidden2[:-1]
    assert set(widths) == {0}
    x = images(4).double()
    assert (narrow(x) - model(x)).abs().max() < 1e-12 * model(x).abs().max()


def test_only_a_rule_lets_an_interaction_go_as_a_whole() -> None:
    model = care()
    bold = slim(budget={"macs": 0.3}, rules=[{"least": 0.0}, {"stage": 0, "least": 0.1}])
    for place in find_places(model):
        assert min(widths_allowed(slim(), place)[0]) == min(16, place.channels)
        allowed = min(widths_allowed(bold, place)[0])
        assert allowed == (16 if place.stage == 0 or place.last else 0)
    plan = make_plan(model, bold, statistics(model), cost_of(model, "macs", SIZE))
    assert any(one.width == 0 for one in plan.widths)
    narrow = cut(model, plan.kept, {p: s.mean_H for p, s in statistics(model).items()})
    refit(narrow, model, images(16).split(8), lambda done: None)
    x = images(2)
    torch.testing.assert_close(rewrite(narrow)(x), narrow(x), rtol=1e-4, atol=1e-4)


def test_a_cut_network_is_an_ordinary_one_of_its_widths() -> None:
    model = care()
    kept = {place: list(range(place.channels))[::2] for place in find_places(model)}
    narrow = cut(model, kept)
    assert narrow.is_slimmed and not model.is_slimmed
    assert narrow.widths.hidden2 == tuple(width // 2 for width in model.widths.hidden2)
    assert narrow.head.fc.in_features == model.head.fc.in_features // 2
    # Every exact rewrite is exact for it, too.
    x = images(3)
    torch.testing.assert_close(rewrite(narrow)(x), narrow(x), rtol=1e-4, atol=1e-4)


def test_channels_cost_what_the_whole_network_counts() -> None:
    whole, narrow = care(), Care("care_nano", 5, widths=NARROW)
    for resolution in (SIZE, 96):
        before, after = measure_cost(whole, resolution), measure_cost(narrow, resolution)
        saved = {"macs": 0, "parameters": 0}
        for place in find_places(whole):
            widths = NARROW.hidden1 if place.branch == "inter1" else NARROW.hidden2
            fewer = place.channels - widths[place.index]
            saved["macs"] += fewer * place.macs_of_channel(resolution, whole)
            saved["parameters"] += fewer * place.parameters_of_channel(whole)
        assert before.macs - after.macs == saved["macs"]
        assert before.parameters - after.parameters == saved["parameters"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_slim_weights_says_its_widths_by_their_shapes(
    suffix: str, tmp_path: Path
) -> None:
    model = Care("care_nano", 5, widths=NARROW).eval()
    path = tmp_path / f"slim{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_checkpoint(model, path, {})
    loaded = care_compress.load_checkpoint(path)
    assert loaded.arch == "care_nano" and loaded.widths == NARROW
    x = images(2)
    assert torch.equal(loaded(x), model(x))


def test_a_slim_file_with_a_layer_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    state = Care("care_nano", 5, widths=NARROW).state_dict()
    del state["stages.1.blocks.1.inter_layer.inter1_fc1.weight"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"inter1_fc1\.weight is missing"):
        care_compress.load_checkpoint(tmp_path / "damaged.pth")


def test_only_a_file_that_says_so_lacks_an_interaction(tmp_path: Path) -> None:
    hidden1 = (0, *NARROW.hidden1[1:])
    model = Care("care_nano", 5, widths=Widths(hidden1, NARROW.hidden2))
    save_checkpoint(model, tmp_path / "said.safetensors", {})
    assert care_compress.load_checkpoint(tmp_path / "said.safetensors").widths.hidden1 == hidden1
    torch.save(model.state_dict(), tmp_path / "lost.pth")
    with pytest.raises(CheckpointError, match=r"0\.inter_layer\.inter1_norm\.weight is missing"):
        care_compress.load_checkpoint(tmp_path / "lost.pth")


@pytest.mark.parametrize(
    "widths",
    [
        Widths(NARROW.hidden1[1:], NARROW.hidden2[1:]),
        Widths((10**6, *NARROW.hidden1[1:]), NARROW.hidden2),
        Widths(NARROW.hidden1, (*NARROW.hidden2[:-1], 0)),
    ],
)
def test_widths_that_no_network_of_the_size_has_are_refused(widths: Widths) -> None:
    with pytest.raises(CareError):
        Care("care_nano", 5, widths=widths)


def test_a_quantized_slim_network_is_the_same_after_saving(tmp_path: Path) -> None:
    rewrites = RewriteSection(fold_norms=False)
    model = cut(care(), {place: range(0, place.channels, 2) for place in find_places(care())})
    job = PtqJob(rewrite(model, rewrites), SIZE, 0, lambda: (one.images for one in batches()))
    made = quantize_network(job, section()).model
    save_quantized(made, section(), rewrites, tmp_path / "model.safetensors")
    loaded, x = load_quantized(tmp_path / "model.safetensors"), images(4)
    assert loaded.widths == model.widths
    assert torch.equal(loaded(x), made(x))
    assert not torch.equal(quantize(section()).model(x), made(x))


def test_scores_add_up_and_the_least_go_first() -> None:
    ranking = by_scores(torch.tensor([3.0, 1.0, 2.0]))
    assert ranking.order == (1, 2, 0)
    assert ranking.loss == (0.0, 1.0, 3.0, 6.0)
    assert ranking.kept(2) == [0, 2] and ranking.kept(0) == []


@pytest.mark.parametrize("number", [2, -1])
def test_magnitudes_count_all_that_belongs_to_a_channel(number: int) -> None:
    model, channel = care(), 5
    place = find_places(model)[number]
    half = bottleneck_at(model, place)
    readers = head_weight(model) if half.fc2 is None else half.fc2.weight.detach().flatten(1)
    parts = [half.fc1.weight[channel], half.conv.weight[channel], readers[:, channel]]
    wanted = sum(float(part.detach().double().square().sum()) for part in parts)
    assert float(magnitude(half, readers)[channel]) == pytest.approx(wanted)
    # A layer that is a hundred times larger rules magnitudes, and no share of them.
    before, shares = magnitude(half, readers).argsort(), module_aware(half, readers)
    assert float(shares.sum()) == pytest.approx(3.0)
    with torch.no_grad():
        half.fc1.weight.mul_(100)
    assert not torch.equal(magnitude(half, readers).argsort(), before)
    torch.testing.assert_close(module_aware(half, readers), shares)


def test_both_heads_read_the_last_channels() -> None:
    """Each through its own norm; what one of them does not read may matter to the other."""
    model = care()
    place = find_places(model)[-1]
    with torch.no_grad():
        model.head.norm.weight[7] = 0
        model.dist_head.norm.weight[[3, 7]] = 0
        model.head.norm.weight[3] = 0
    seen = statistics(model)[place]
    ranking = by_reconstruction(head_weight(model), seen.covariance_HH, seen.importance_O)
    assert set(ranking.order[:2]) == {3, 7}
    with torch.no_grad():
        model.dist_head.norm.weight[3] = 5.0
    ranking = by_reconstruction(head_weight(model), seen.covariance_HH, seen.importance_O)
    assert ranking.order[0] == 7 and 3 not in ranking.order[:20]
    # The rows that are watched are what the mean of the heads is linear in.
    x = images(4)
    with torch.no_grad():
        pooled = model.forward_features(x)[-1].mean(dim=(2, 3))
        linear = head_input(pooled) @ head_weight(model).T
        rest = model(x) - linear
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-4, atol=1e-4)


def problem(samples: int = 400, hidden: int = 7, outputs: int = 4) -> tuple[Tensor, Tensor]:
    """Correlated inputs (S, H) and a weight (O, H)."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, hidden, generator=generator, dtype=torch.float64) @ mixing
    return inputs, torch.randn(outputs, hidden, generator=generator, dtype=torch.float64)


def residual(inputs: Tensor, weight: Tensor, kept: list[int], importance: Tensor) -> float:
    """What is lost when `kept` make up for all inputs by least squares."""
    target = inputs @ weight.T
    target = target - target.mean(dim=0)
    if not kept:
        left = target
    else:
        chosen = inputs[:, kept] - inputs[:, kept].mean(dim=0)
        left = target - chosen @ torch.linalg.lstsq(chosen, target).solution
    return float((left.square().mean(dim=0) * importance).sum())


def test_the_loss_of_a_reconstruction_is_that_of_least_squares() -> None:
    inputs, weight = problem()
    importance = torch.tensor([1.0, 0.2, 3.0, 0.5], dtype=torch.float64)
    ranking = by_reconstruction(weight, torch.cov(inputs.T, correction=0), importance)
    for gone in range(len(ranking.order) + 1):
        kept = ranking.kept(len(ranking.order) - gone)
        wanted = residual(inputs, weight, kept, importance)
        assert ranking.loss[gone] == pytest.approx(wanted, rel=2e-3, abs=1e-9)
    # The first to go is the best of all.
    alone = [
        residual(inputs, weight, [c for c in range(7) if c != gone], importance)
        for gone in range(7)
    ]
    assert ranking.order[0] == alone.index(min(alone))


def test_the_normal_equations_are_least_squares_with_a_pull() -> None:
    inputs, weight = problem()
    targets = inputs @ weight.T + 0.3 + torch.randn(400, 4, dtype=torch.float64)
    normal = Normal(7, 4)
    for rows in torch.arange(400).split(130):
        normal.add(inputs[rows], targets[rows])
    fitted, bias = normal.solve(torch.zeros_like(weight), ridge=0.0)
    with_one = torch.cat([inputs, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    wanted = torch.linalg.lstsq(with_one, targets).solution.T
    torch.testing.assert_close(fitted, wanted[:, :-1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bias, wanted[:, -1], rtol=1e-6, atol=1e-9)
    held, _ = normal.solve(weight, ridge=1e9)
    torch.testing.assert_close(held, weight, rtol=1e-6, atol=1e-6)


def test_refitting_brings_a_cut_network_nearer_to_the_whole_one() -> None:
    model, x = care(), images(48)
    # Not the last ones: 48 images say too little of so many of the head's weights, which stay.
    kept = {p: range(0, p.channels, 2) for p in find_places(model) if not p.last}
    plain, refitted = cut(model, kept), cut(model, kept)
    refit(refitted, model, x.split(16), lambda done: None)
    with torch.no_grad():
        errors = [float((one(x) - model(x)).square().mean()) for one in (plain, refitted)]
    assert errors[1] < 0.3 * errors[0]


def test_refitting_the_whole_network_leaves_its_function() -> None:
    model, x = care().double(), images(48).double()
    twin = cut(model, {})
    refit(twin, model, x.split(16), lambda done: None)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-6, atol=1e-8)


def test_hidden_channels_are_watched_as_they_are() -> None:
    model = care()
    seen = statistics(model)
    place = find_places(model)[3]
    half = bottleneck_at(model, place)
    caught: list[Tensor] = []
    assert half.fc2 is not None
    handle = half.fc2.register_forward_hook(lambda module, args, out: caught.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(batch.images)
    handle.remove()
    rows = torch.cat(caught).permute(1, 0, 2, 3).flatten(1).double()
    torch.testing.assert_close(seen[place].mean_H, rows.mean(dim=1), rtol=1e-4, atol=1e-5)
    covariance = torch.cov(rows, correction=0)
    torch.testing.assert_close(seen[place].covariance_HH, covariance, rtol=1e-3, atol=1e-4)


def test_a_channel_that_nobody_reads_is_the_least_important() -> None:
    model = care()
    place = find_places(model)[3]
    half = bottleneck_at(model, place)
    assert half.fc2 is not None
    with torch.no_grad():
        half.fc2.weight[:, 11] = 0
    seen = statistics(model)[place]
    assert int(seen.taylor_H.argmin()) == 11 and float(seen.taylor_H[11]) == 0
    weight = half.fc2.weight.detach().flatten(1)
    assert by_reconstruction(weight, seen.covariance_HH, seen.importance_O).order[0] == 11


def test_the_taylor_score_is_the_slope_of_the_loss() -> None:
    """By growing one channel by a little: E (d loss / d its scale)^2, image by image."""
    model = care().double()
    place, channel, step = find_places(model)[6], 9, 1e-5
    batch = batches(8)[0]
    exact = Batch(batch.images.double(), batch.labels, batch.indices)
    seen = measure_hidden(TASK, model, [exact], 0, lambda done: None)
    half = bottleneck_at(model, place)
    assert half.fc2 is not None

    def losses(scale: float) -> Tensor:
        grown = torch.ones(place.channels, 1, 1, dtype=torch.float64)
        grown[channel] = scale
        handle = half.fc2.register_forward_pre_hook(lambda module, args: (args[0] * grown,))
        with torch.no_grad():
            logits = model(exact.images)
        handle.remove()
        return torch.nn.functional.cross_entropy(logits, exact.labels, reduction="none")

    slopes = (losses(1 + step) - losses(1 - step)) / (2 * step)
    assert float(seen[place].taylor_H[channel]) == pytest.approx(
        float(slopes.square().mean()), rel=1e-4
    )


def test_the_importance_of_an_output_is_what_an_error_there_does_to_the_logits() -> None:
    """By pushing outputs at random: E (d logits)^2 is importance times the push's variance."""
    model = care()
    place = find_places(model)[6]
    half = bottleneck_at(model, place)
    assert half.fc2 is not None
    wanted = float(
        measure_hidden(TASK, model, batches(48), 0, lambda n: None)[place].importance_O.sum()
    )
    generator, found = torch.Generator().manual_seed(0), []
    size = 1e-3
    handle = half.fc2.register_forward_hook(
        lambda module, args, out: out + size * torch.randn(out.shape, generator=generator)
    )
    x = images(48)
    with torch.no_grad():
        pushed = [model(x) for _ in range(8)]
        handle.remove()
        before = model(x)
    for after in pushed:
        change = after - before
        found.append(float((change - change.mean(dim=1, keepdim=True)).square().sum(dim=1).mean()))
    assert sum(found) / len(found) / size**2 == pytest.approx(wanted, rel=0.35)


def test_the_widths_chosen_lose_least_of_all_that_fit() -> None:
    places = [Place(i, 0, "inter1", i, 4, 6, False) for i in range(3)]
    generator = torch.Generator().manual_seed(1)
    rankings = {
        place: by_scores(torch.rand(6, generator=generator) * (index + 1))
        for index, place in enumerate(places)
    }
    options = {place: (2, 4, 6) for place in places}
    price = {place: index + 1.5 for index, place in enumerate(places)}
    budget = 30.1  # costs are rounded up to 1 in 8,000
    limit = Limit(lambda place, width: width * price[place], budget)
    found = choose_widths(rankings, options, limit)
    losses = {
        widths: sum(rankings[p].loss[6 - w] for p, w in zip(places, widths, strict=True))
        for widths in itertools.product((2, 4, 6), repeat=3)
        if sum(w * price[p] for p, w in zip(places, widths, strict=True)) <= budget
    }
    assert tuple(found.values()) == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("importance", ["reconstruct", "taylor", "module_aware", "magnitude"])
def test_a_budget_is_met_within_three_percent(kind: str, importance: str) -> None:
    model = care()
    asked = slim(budget={kind: 0.6}, importance=importance, multiple=4)
    plan = make_plan(model, asked, statistics(model), cost_of(model, kind, SIZE))
    narrow = cut(model, plan.kept)
    before, after = (getattr(measure_cost(one, SIZE), kind) for one in (model, narrow))
    assert 0.57 <= after / before <= 0.6
    assert after == plan.after
    assert all(one.width % 4 == 0 for one in plan.widths)


def test_the_last_rule_that_matches_limits_a_place() -> None:
    model = care()
    asked = slim(
        rules=[{"least": 0.5}, {"stage": 2, "least": 1.0}, {"branch": "inter2", "least": 0.3}]
    )
    for place in find_places(model):
        widths, rule = widths_allowed(asked, place)
        if place.branch == "inter2":
            assert rule == 3 and min(widths) >= 0.3 * place.channels
        elif place.stage == 2:
            assert rule == 2 and widths == (place.channels,)
        else:
            assert rule == 1 and min(widths) >= 0.5 * place.channels
    plan = make_plan(model, asked, statistics(model), cost_of(model, "macs", SIZE))
    untouched = [one for one in plan.widths if one.rule == 2]
    assert untouched and all(one.width == one.place.channels for one in untouched)


@pytest.mark.parametrize("seed", range(8))
def test_two_budgets_are_kept_at_nearly_the_least_loss(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = [Place(stage, 0, "inter1", stage, 4, 16, False) for stage in range(4)]
    rankings = {
        place: by_scores(torch.rand(16, generator=generator).square() * (1 + index))
        for index, place in enumerate(places)
    }
    options = {place: tuple(range(4, 17)) for place in places}
    prices = dict(zip(places, torch.rand(4, generator=generator).add(0.3).tolist(), strict=True))
    budget = Limit(lambda place, width: width * prices[place], 0.6 * 16 * sum(prices.values()))
    numbers = sum(place.hidden_numbers(16) for place in places)
    alone = choose_widths(rankings, options, budget)
    everything = [
        dict(zip(places, widths, strict=True)) for widths in itertools.product(*options.values())
    ]
    within = [widths for widths in everything if budget.left(widths) >= 0]

    def loss(widths: Mapping[Place, int]) -> float:
        return sum(rankings[place].loss[16 - width] for place, width in widths.items())

    for share in (1.0, 0.7, 0.5, 0.35):
        second = Limit(Place.hidden_numbers, share * numbers)
        found = choose_within_both(rankings, options, budget, second)
        assert budget.left(found) >= 0 and second.left(found) >= 0
        if second.left(alone) >= 0:
            assert found == alone
        least = min(loss(widths) for widths in within if second.left(widths) >= 0)
        assert loss(found) <= 1.08 * least  # a price reaches the hull of what is possible
        for place, width in found.items():  # and nothing is left that one place could use
            wider = found | {place: width + 1}
            assert width == 16 or budget.left(wider) < 0 or second.left(wider) < 0


def test_hidden_numbers_are_held_to_their_part_of_the_budget() -> None:
    model = care()
    cost = cost_of(model, "macs", SIZE)
    asked = {"importance": "magnitude", "multiple": 4, "budget": {"macs": 0.6}}
    alone = make_plan(model, slim(**asked), {}, cost)
    assert alone.hidden_wanted is None
    left, losses = [alone.hidden], [sum(one.loss for one in alone.widths)]
    for part in (0.5, 0.4):
        plan = make_plan(model, slim(**asked, hidden=part), {}, cost)
        counted = sum(one.width / 4**one.place.stage for one in plan.widths)
        whole = sum(one.place.channels / 4**one.place.stage for one in plan.widths)
        assert plan.hidden == pytest.approx(counted / whole)
        assert plan.hidden_wanted == pytest.approx(0.6 * part)
        assert 0.94 * plan.hidden_wanted <= plan.hidden <= plan.hidden_wanted
        assert plan.after <= plan.wanted
        left.append(plan.hidden)
        losses.append(sum(one.loss for one in plan.widths))
        assert plan.as_json()["hidden"] == {"left": plan.hidden, "allowed": plan.hidden_wanted}
        said = Console(record=True, file=io.StringIO(), width=100)
        print_slim_plan(plan, said)
        told = f"{plan.hidden:.3f} stay; slim.hidden leaves {0.6 * part:.3f}"
        assert told in said.export_text()
    assert left[0] > left[1] > left[2] and losses[0] < losses[1] < losses[2]


def test_hidden_numbers_keep_to_rules_and_belong_to_multiply_accumulates() -> None:
    model = care()
    cost = cost_of(model, "macs", SIZE)
    asked = slim(rules=[{"stage": 0, "least": 0.5}], hidden=0.8, multiple=4, importance="magnitude")
    plan = make_plan(model, asked, {}, cost)
    assert plan.hidden_wanted is not None and plan.hidden <= plan.hidden_wanted
    assert all(one.width >= 0.5 * one.place.channels for one in plan.widths if one.place.stage == 0)
    for kind in ("latency", "parameters"):
        other = slim(budget={kind: 0.7}, hidden=0.1, importance="magnitude")
        assert hidden_limit(other) is None
        assert make_plan(model, other, {}, cost).hidden > 0.07
    kept = slim(rules=[{"stage": 0, "least": 1.0}], hidden=0.1)
    with pytest.raises(RecipeError, match=r"slim\.hidden 0\.1 cannot be met") as refused:
        check_budget(kept, cost)
    assert "\n" not in refused.value.message
    assert "raise it to 0.59, lower slim.multiple and slim.rules" in refused.value.fix
    tight = kept.model_copy(update={"budget": SlimBudgetSection(macs=0.4)})
    with pytest.raises(RecipeError, match=r"slim\.hidden.* narrowest it is 1\.02") as refused:
        check_budget(tight, cost)
    assert refused.value.fix.startswith("raise the budget")
    narrowest = {place: min(widths_allowed(kept, place)[0]) for place in cost.places}
    share = hidden_share(narrowest)
    for short, part in ((True, share - 1e-6), (False, share + 1e-6)):
        asked = kept.model_copy(update={"hidden": part / kept.budget.share})
        with pytest.raises(RecipeError) if short else contextlib.nullcontext():
            check_budget(asked, cost)
    # Where they meet to the last bit, whatever is not refused is planned.
    planned = 0
    shares, limited = (0.5, 0.6, 0.7, 0.8, 0.9), ({"least": 0.3}, {"stage": 3, "least": 0.5})
    for macs, rule in itertools.product(shares, limited):
        just = slim(budget={"macs": macs}, rules=[rule], importance="magnitude")
        narrowest = {place: min(widths_allowed(just, place)[0]) for place in cost.places}
        just = just.model_copy(update={"hidden": hidden_share(narrowest) / macs})
        with contextlib.suppress(RecipeError):
            check_budget(just, cost)
            plan = make_plan(model, just, {}, cost)
            assert {one.place: one.width for one in plan.widths} == narrowest
            planned += 1
    assert planned > 0


def test_what_cannot_be_slimmed_as_asked_is_refused_in_one_line() -> None:
    model = care()
    with pytest.raises(RecipeError, match="slimmed already"):
        check_slim(Care("care_nano", 5, widths=NARROW), slim())
    with pytest.raises(RecipeError, match=r"rule 2 .* matches no interaction"):
        check_slim(model, slim(rules=[{"least": 0.5}, {"stage": 1, "block": 7, "least": 1.0}]))
    cost = cost_of(model, "macs", SIZE)
    with pytest.raises(RecipeError, match="cannot be met") as refused:
        check_budget(slim(budget={"macs": 0.05}), cost)
    assert "\n" not in refused.value.message
    check_budget(slim(budget={"macs": 0.5}), cost)


def test_a_budget_that_only_the_narrowest_widths_meet_is_met_by_them() -> None:
    model = care()
    cost = cost_of(model, "macs", SIZE)
    narrowest = {place: min(widths_allowed(slim(), place)[0]) for place in cost.places}
    spent = cost.fixed + sum(cost.of(place, width) for place, width in narrowest.items())
    tight = slim(budget={"macs": (spent + 1) / cost.total}, importance="magnitude")
    assert {one.place: one.width for one in make_plan(model, tight, {}, cost).widths} == narrowest
