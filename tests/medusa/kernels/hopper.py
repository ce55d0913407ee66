"""What the tests of Hopper's own kernels share: who can run them, what their machine code shows, what is launched."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

from medusa.kernels import tiles
from medusa.kernels.hopper import Kernel, compiled, has_compiler
from medusa.kernels.launch import has_warpgroups

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="NVIDIA's bindings or compiler are missing")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_warpgroups(torch.device("cuda")), reason="needs a Hopper GPU"
)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def products_and_waits(kernel: Kernel, folder: Path) -> tuple[int, int]:
    """Instructions of the tensor cores, and waits for them, in code that must keep all it has in registers."""
    code = folder / "code.cubin"
    code.write_bytes(compiled(kernel))
    usage, assembly = (
        subprocess.run([CUOBJDUMP, how, code], capture_output=True, text=True, check=True).stdout
        for how in ("-res-usage", "-sass")
    )
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, (kernel, usage)
    return assembly.count(" HGMMA."), assembly.count("WARPGROUP.DEPBAR")


def recorded(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans are as on Hopper from here on, and what the driver would be asked to launch is listed instead."""
    launched: list[Any] = []
    monkeypatch.setattr(tiles, "has_warpgroups", lambda _: True)
    monkeypatch.setattr(tiles, "has_compiler", lambda: True)
    monkeypatch.setattr(tiles, "_processors", lambda _: 132)
    monkeypatch.setattr(module, "tensor_map", lambda *described: described)
    monkeypatch.setattr(module, "launch", lambda *launch: launched.append(launch))
    return launched


def launch_of(launched: list[Any]) -> tuple[Any, Any, Any, Any, list[Any]]:
    """The last one's kernel, grid, maps of the matrix and of X without their tensors, and other arguments."""
    kernel, _, grid, (weight_map, x_map, *rest) = launched.pop()
    return kernel, grid, weight_map[1:], x_map[1:], [argument.value for argument in rest]
