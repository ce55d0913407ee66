"""What the launches of Triton kernels share: integer keys of floats, programmatic dependent launch.

Order-preserving keys: the bits of a float32, with all but the sign flipped where negative, compare as signed integers
as the floats do. A packed pair is such a key above the complement of an index, so that one integer maximum finds the
largest value and, among equals, the lowest index.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def options(pdl: bool) -> dict[str, Any]:
    """Launch options: with `pdl` the kernel may start while its predecessor ends (Hopper and later)."""
    return {"launch_pdl": True} if pdl else {}


def supports_pdl(device: torch.device) -> bool:
    """Whether the device can start a kernel before the one ahead of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_warpgroups(device: torch.device) -> bool:
    """Whether four warps of the device multiply tiles of 64 rows together (Hopper alone)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def await_inputs(PDL: tl.constexpr, EARLY: tl.constexpr = False) -> None:
    """First call of every kernel: under programmatic dependent launch, waits for the previous kernel's writes, then
    lets the next kernel be scheduled (which in turn waits here for this one to end).

    EARLY lets the next be scheduled first, so that it may begin while the previous kernel still runs. Before it waits
    itself, that next kernel may read nothing that this kernel or the previous one writes, and write nothing; nor may it
    be early in its turn. A product by a ring (ring_product.cu) is such a one: it reads its frozen matrix until then.
    """
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def order_key(x):
    """float32 to int32, order kept; the two zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pack_pair(value, index):
    """The float32 `value` and its non-negative int32 `index` as one int64."""
    return (order_key(value).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def packed_index(pair):
    return 0x7FFFFFFF - (pair & 0x7FFFFFFF)
