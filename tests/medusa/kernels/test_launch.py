"""Which GPUs get launches that only Hopper has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from medusa.kernels.launch import has_warpgroups, options, supports_pdl


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True)])
def test_dependent_launch_is_asked_of_hopper_alone(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert supports_pdl(torch.device("cuda")) is expected
    assert options(supports_pdl(torch.device("cuda"))) == ({"launch_pdl": True} if expected else {})
    assert not supports_pdl(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_warpgroups_are_hoppers_alone(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_warpgroups(torch.device("cuda")) is expected
    assert not has_warpgroups(torch.device("cpu"))
