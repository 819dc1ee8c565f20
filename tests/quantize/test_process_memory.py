"""What `plan` and a sweep's plan say of memory: a formula whose parts are there to be checked."""

import json

import pytest
import torch
from quantized import care
from torch import nn
from typer.testing import CliRunner

from care_compress import cli
from care_compress.model.cost import measure_activations
from care_compress.model.rewrite import rewrite
from care_compress.quantize.process_memory import LIBRARIES, RUN, SIMULATED, memory_of
from care_compress.recipe.recipe import load_recipe


class Chain(nn.Module):
    """Three products of one image, of 8, 16 and 8 channels; two of them are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False),
            nn.Conv2d(8, 16, 1, bias=False),
            nn.Conv2d(16, 8, 1, bias=False),
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.parts(x_BCHW)
        return out


def test_activations_are_those_at_once_and_all_together() -> None:
    found = measure_activations(Chain(), 10)
    pixels = 4 * 10 * 10
    assert (found.live, found.kept) == (pixels * (8 + 16), pixels * (8 + 16 + 8))


def test_a_view_takes_nothing() -> None:
    assert measure_activations(nn.Flatten(), 10).kept == 0


def test_memory_grows_with_what_a_process_holds() -> None:
    network = rewrite(care())
    small = memory_of(load_recipe("int8_qat", ["data.workers=0"]), network)
    larger = ["data.workers=0", "quantize.qat.batch_size=1024"]
    more = memory_of(load_recipe("int8_qat", larger), network)
    assert more[RUN].total > small[RUN].total, "a training keeps every image's activations"
    assert more["sensitivity"] == small["sensitivity"], "and no worker trains"
    one, size = measure_activations(network, 64), 4 * 3 * 64 * 64
    assert small["sensitivity"].parts["images"] == 256 * size
    assert small["sensitivity"].parts["activations"] == SIMULATED * 64 * one.live
    assert small["accuracy"].total > LIBRARIES
    assert "search" not in small and "search" in memory_of(load_recipe("mixed_auto"), network)


def test_plan_says_what_a_run_and_a_worker_take() -> None:
    done = CliRunner().invoke(cli.app, ["plan", "int8_ptq"], env={"COLUMNS": "200"})
    assert "memory: a run at most about" in done.output
    assert "a worker of --ray: accuracy" in done.output and "sensitivity" in done.output
    told = CliRunner().invoke(cli.app, ["plan", "int8_ptq", "--json"])
    memory = json.loads(told.output)["memory_bytes"]
    assert set(memory) == {"accuracy", "sensitivity", RUN}
    for one in memory.values():
        assert one.pop("total") == pytest.approx(sum(one.values()))
