"""The wrapper with which the kernels' tests run on a GPU, here with copies on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.medusa.kernels.on_device import on_device

NAN = float("nan")


@dataclass(frozen=True)
class Plan:
    splits: int
    sums: torch.Tensor | None

    @property
    def merges(self) -> bool:
        return self.splits > 1


def double(x, out):
    """As a launch does it: writes and returns its `out`, or the one sum that there is in it."""
    target = out[0] if out.dim() == 3 and len(out) == 1 else out
    return target.copy_(2 * x)


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3)])
def test_a_returned_out_is_the_callers_own(shape):
    out = torch.full(shape, NAN)
    found = on_device(double, "cpu")(torch.ones(4, 3), out)
    assert found.shape == (4, 3) and found.data_ptr() == out.data_ptr()
    assert found.eq(2).all() and out.eq(2).all()


def test_a_strided_out_keeps_its_place_and_what_lies_beside_it():
    wide = torch.full((4, 2, 3), NAN)
    found = on_device(double, "cpu")(torch.ones(4, 3), wide[:, 1])
    assert found.data_ptr() == wide[:, 1].data_ptr() and found.stride() == (6, 1)
    assert wide[:, 1].eq(2).all() and wide[:, 0].isnan().all()


def test_the_launch_sees_copies_that_lie_as_the_tensors_do():
    x, seen = torch.zeros(4, 6), {}

    def launch(left, *, plan, pair):
        seen.update(left=left, plan=plan, pair=pair)
        left.fill_(1)

    both = on_device(launch, "cpu")
    assert both(x[:, :3], plan=Plan(2, x[:, 3:]), pair=(x, None, 0.5)) is None
    assert seen["left"].data_ptr() not in (x.data_ptr(), 0) and seen["left"].stride() == (6, 1)
    assert seen["plan"].merges and seen["plan"].sums.data_ptr() == seen["left"].data_ptr() + 3 * x.itemsize
    assert seen["pair"][0].data_ptr() == seen["left"].data_ptr() and seen["pair"][1:] == (None, 0.5)
    assert x[:, :3].eq(1).all() and x[:, 3:].eq(0).all()  # a view that was only read brings nothing old back


def test_a_launch_within_a_launch_and_other_results():
    inner = on_device(double, "cpu")
    outer = on_device(lambda x, out: (inner(x, out), torch.ones(2), 7), "cpu")
    out = torch.empty(2, 2)
    found, other, number = outer(torch.ones(2, 2), out)
    assert found.data_ptr() == out.data_ptr() and out.eq(2).all()
    assert other.eq(1).all() and number == 7


def test_an_error_passes_and_changes_nothing():
    def launch(out):
        out.fill_(1)
        raise ValueError("splits write")

    out = torch.zeros(2)
    with pytest.raises(ValueError, match="splits write"):
        on_device(launch, "cpu")(out)
    assert out.eq(0).all()
