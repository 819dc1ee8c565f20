"""Several processes: shares of a list, and a BatchNorm of the whole batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from care_compress.run import processes
from care_compress.run.processes import GlobalBatchNorm2d, World


@given(st.integers(0, 100), st.integers(1, 9))
def test_shares_are_alike_and_together_everything(count: int, size: int) -> None:
    shares = [range(*World(rank, size).share(count)) for rank in range(size)]
    assert [one for share in shares for one in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def images(count: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 3 + torch.randn(count, 4, 3, 5, generator=draw, dtype=torch.float64)


def test_a_norm_over_processes_is_torchs_over_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of another process with 2 images only the sums arrive here, beside our own 6."""
    own, other = images(6, 0), images(2, 1)
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3).double()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    ours = GlobalBatchNorm2d.of(norm)
    whole = torch.cat([own, other])
    mean = whole.mean(dim=(0, 2, 3))
    theirs = iter(
        [
            torch.cat([other.sum(dim=(0, 2, 3)), torch.tensor([2.0 * 15])]),
            (other - mean.view(-1, 1, 1)).square().sum(dim=(0, 2, 3)),
        ]
    )
    monkeypatch.setattr(processes, "sum_over_processes", lambda values: values + next(theirs))
    found, expected = ours(own), norm(whole)[:6]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(ours.running_mean, norm.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, norm.running_var, atol=1e-6)
    assert ours.num_batches_tracked == norm.num_batches_tracked == 1
    assert torch.allclose(ours.eval()(own), norm.eval()(own), atol=1e-5)
