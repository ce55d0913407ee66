"""The instructions that widen weights of one byte, carried out one by one for every byte; a GPU runs them for real in
interpreted/test_quantized_matmul.py."""

from __future__ import annotations

import re

import pytest
import torch

from tests.medusa.interpreter import needs_triton

pytestmark = needs_triton


def both_halves(packed: int) -> torch.Tensor:
    """The two bfloat16 of a register, the low one first."""
    return torch.tensor([packed & 0xFFFF, packed >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def register(halves: torch.Tensor) -> int:
    low, high = halves.view(torch.uint16).tolist()
    return high << 16 | low


def prmt(a: int, b: int, selector: int) -> int:
    chosen = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(chosen[selector >> 4 * i & 7] for i in range(4)), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> bit & 1) << i for i, bit in enumerate(bits))


def fma(a: int, b: int, c: int) -> int:
    """In float64, which holds every product and sum here exactly; rounded once."""
    x, y, z = (both_halves(value).double() for value in (a, b, c))
    return register((x * y + z).to(torch.bfloat16))


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def carried_out(assembly: str, packed: int) -> list[int]:
    """What the instructions leave in $0 and $1, given $2."""
    registers = {"$2": packed}
    for line in re.findall(r"^\s*([a-z][^;{}]*);", assembly, re.MULTILINE):
        operation, operands = line.split(" ", 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = (registers[name] if name in registers else int(name, 0) for name in sources)
        registers[target] = OPERATIONS[operation](*values)
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize(("name", "dtype"), [("INT8_TO_BF16", torch.int8), ("E4M3_TO_BF16", torch.float8_e4m3fn)])
def test_every_byte_becomes_its_own_value(name, dtype):
    from medusa.kernels import widen

    values = torch.arange(256, dtype=torch.uint8).roll(3)  # four to a register, each byte at some place in it
    widened = []
    for four in values.view(64, 4).tolist():
        for register_ in carried_out(getattr(widen, name).value, int.from_bytes(bytes(four), "little")):
            widened += both_halves(register_).tolist()
    expected = values.view(dtype).float()
    whole = ~expected.isnan()
    assert torch.tensor(widened)[whole].equal(expected[whole])
    assert torch.tensor(widened)[~whole].abs().eq(480).all()
