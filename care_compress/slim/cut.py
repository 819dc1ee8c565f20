"""Cutting channels out: an ordinary smaller dense network, without masks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from care_compress.model.care import Care, Widths
from care_compress.slim.places import Place

Kept = Mapping[Place, Sequence[int]]  # channels that stay; a place that is not named stays whole


@torch.no_grad()
def cut(model: Care, kept: Kept, means: Mapping[Place, Tensor] | None = None) -> Care:
    """A copy of a network with nothing but the `kept` channels; without any, a place is gone.

    What is cut was, on average, the `means` of its hidden channels: the 1x1 behind them takes that
    part over as a constant, b2 += W2[:, c] E[h_c]. It is exact for channels that never vary.
    """
    widths = {"inter1": list(model.widths.hidden1), "inter2": list(model.widths.hidden2)}
    state = dict(model.state_dict())
    for place, channels in kept.items():
        widths[place.branch][place.index] = len(channels)
        prefix = f"stages.{place.stage}.blocks.{place.block}.inter_layer.{place.branch}_"
        if not channels:
            if means is not None:
                _hand_on_mean(state, place, means[place])
            state = {name: value for name, value in state.items() if not name.startswith(prefix)}
            continue
        chosen = torch.as_tensor(channels)
        readers = model.readers_of(place.stage) if place.last else (f"{prefix}fc2",)
        pooled = place.last and model.pools
        if means is not None and not pooled:
            gone = torch.ones(place.channels, dtype=torch.bool)
            gone[chosen] = False
            for name in readers:
                weight = state[f"{name}.weight"].flatten(1).double()
                _add(state, f"{name}.bias", weight[:, gone] @ means[place].double()[gone])
        for name in ("fc1.weight", "fc1.bias", "conv.weight", "conv.bias"):
            state[prefix + name] = state[prefix + name][chosen]
        if pooled:
            for name in ("weight", "bias"):
                for head in ("head", "dist_head"):
                    state[f"{head}.norm.{name}"] = state[f"{head}.norm.{name}"][chosen]
        for name in readers:
            state[f"{name}.weight"] = state[f"{name}.weight"][:, chosen]
    narrow = Widths(tuple(widths["inter1"]), tuple(widths["inter2"]))
    slim = type(model)(model.arch, model.num_classes, widths=narrow).to(next(model.parameters()))
    slim.load_state_dict(state)
    return slim.train(model.training)


def _hand_on_mean(state: dict[str, Tensor], place: Place, mean_H: Tensor) -> None:
    """Give the mean of a whole place to its other half, as far as that can hold it.

    What inter1 added to the features on average moves into the norm of inter2, which reads them,
    and past it into the bias behind. Of inter2 only the features have a bias to go to.
    """
    inter = f"stages.{place.stage}.blocks.{place.block}.inter_layer."
    own = f"{inter}{place.branch}_fc2."
    constant = state[f"{own}weight"].flatten(1).double() @ mean_H.double()
    constant += state[f"{own}bias"].double()
    if place.branch == "inter2":
        if f"{inter}inter1_fc2.bias" in state:
            features = len(state[f"{inter}inter1_fc2.bias"])
            _add(state, f"{inter}inter1_fc2.bias", constant[-features:])
        return
    if f"{inter}inter2_norm.running_mean" in state:
        memory = len(state[f"{inter}inter2_norm.running_mean"]) - len(constant)
        everything = torch.cat([constant.new_zeros(memory), constant])
        _add(state, f"{inter}inter2_norm.running_mean", -everything)
        if f"{inter}inter2_fc2.bias" in state:
            _add(state, f"{inter}inter2_fc2.bias", everything)


def _add(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a parameter in float64; `state` gets a new tensor, the network keeps its own."""
    state[name] = (state[name].double() + value).to(state[name].dtype)
