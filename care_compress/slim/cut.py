"""Cutting channels out: an ordinary smaller dense network, without masks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from care_compress.model.care import Care, Widths
from care_compress.slim.places import Place

Kept = Mapping[Place, Sequence[int]]  # channels that stay; a place that is not named stays whole


@torch.no_grad()
def cut(model: Care, kept: Kept, means: Mapping[Place, Tensor] | None = None) -> Care:
    """A copy of a network with nothing but the `kept` channels.

    What is cut was, on average, the `means` of its hidden channels: the second 1x1 takes that
    part over as a constant, b2 += W2[:, c] E[h_c]. It is exact for channels that never vary.
    """
    widths = {"inter1": list(model.widths.hidden1), "inter2": list(model.widths.hidden2)}
    state = dict(model.state_dict())
    for place, channels in kept.items():
        widths[place.branch][place.index] = len(channels)
        prefix = f"stages.{place.stage}.blocks.{place.block}.inter_layer.{place.branch}_"
        if not channels:
            state = {name: value for name, value in state.items() if not name.startswith(prefix)}
            continue
        chosen = torch.as_tensor(channels)
        if means is not None and not place.last:
            gone = torch.ones(place.channels, dtype=torch.bool)
            gone[chosen] = False
            weight = state[f"{prefix}fc2.weight"].flatten(1).double()
            part = weight[:, gone] @ means[place].double()[gone]
            bias = state[f"{prefix}fc2.bias"]
            state[f"{prefix}fc2.bias"] = (bias.double() + part).to(bias.dtype)
        for name in ("fc1.weight", "fc1.bias", "conv.weight", "conv.bias"):
            state[prefix + name] = state[prefix + name][chosen]
        readers = [f"{prefix}fc2.weight"]
        if place.last:
            readers = ["head.fc.weight", "dist_head.fc.weight"]
            for name in ("weight", "bias"):
                for head in ("head", "dist_head"):
                    state[f"{head}.norm.{name}"] = state[f"{head}.norm.{name}"][chosen]
        for name in readers:
            state[name] = state[name][:, chosen]
    narrow = Widths(tuple(widths["inter1"]), tuple(widths["inter2"]))
    slim = Care(model.arch, model.num_classes, widths=narrow).to(next(model.parameters()))
    slim.load_state_dict(state)
    return slim.train(model.training)
