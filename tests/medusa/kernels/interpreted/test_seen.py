"""What Hydra heads see equals embed_path's, and their blocks PathBlock's and ResidualBlock's."""

from __future__ import annotations

import pytest
import torch

from medusa.heads import ResidualBlock
from medusa.hydra import PathBlock, embed_path
from medusa.kernels import seen

SIZE = 40


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_slot_sees_its_rows_hidden_state_and_scaled_embeddings(dtype, tokens):
    hidden_Rd, embedded_CJd = random(4, SIZE, dtype=dtype), random(3, tokens, SIZE, seed=1, dtype=dtype) * 50
    embedded_CJd[0, 0] = 0  # stays zero
    row_M = torch.tensor([0, 1, 2, 1, 3], dtype=torch.int32)
    out = torch.full((3, (tokens + 1) * SIZE), float("nan"), dtype=dtype)
    seen.see(torch.tensor([3, -1, 2], dtype=torch.int32), row_M, hidden_Rd, embedded_CJd, out)
    assert torch.equal(out[:, :SIZE], hidden_Rd[[1, 3, 2]])
    ahead_CJd = embed_path(lambda _: embedded_CJd, torch.zeros(3, tokens))
    rtol = 1e-5 if dtype == torch.float32 else 2e-2  # the interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(out[:, SIZE:], ahead_CJd.flatten(1), rtol=rtol, atol=0)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_block_equals_its_module(splits, tokens):
    block, width = PathBlock(SIZE, tokens) if tokens else ResidualBlock(SIZE), (tokens + 1) * SIZE
    weight, bias = random(SIZE, width, seed=3) * 0.3, random(SIZE, seed=4)
    block.linear.weight.data, block.linear.bias.data = weight, bias
    x = random(5, width)
    parts = [x[:, k::splits] @ weight[:, k::splits].T for k in range(splits)]
    out = torch.empty(5, SIZE)
    seen.add_silu(torch.stack(parts), bias, x[:, :SIZE], out)
    expected = block(x[:, :SIZE], x[:, SIZE:].view(5, tokens, SIZE)) if tokens else block(x)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_block_in_bfloat16_adds_what_came_in_float32():
    partial, bias, x = random(2, 6, SIZE), random(SIZE, seed=1, dtype=torch.bfloat16), random(6, 3 * SIZE, seed=2)
    residual = x.bfloat16()[:, :SIZE]
    out = torch.empty(6, SIZE, dtype=torch.bfloat16)
    seen.add_silu(partial, bias, residual, out)
    added = (partial.sum(0) + bias.float()).bfloat16()
    torch.testing.assert_close(out, residual + torch.nn.functional.silu(added), rtol=2e-2, atol=0.1)


def test_rows_of_several_heads_share_one_of_the_residual():
    partial, residual = random(1, 6, SIZE), random(2, SIZE, seed=1)
    out = torch.empty(6, SIZE)
    seen.add_silu(partial, None, residual, out, sharing=3)
    expected = residual.repeat_interleave(3, 0) + torch.nn.functional.silu(partial[0])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="6 rows of which 2 share one of the residual were given 2"):
        seen.add_silu(partial, None, residual, out, sharing=2)


def test_wrong_buffers_are_named():
    with pytest.raises(ValueError, match="embedded_CJd must be a contiguous torch.float32"):
        seen.see(
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(2, SIZE),
            torch.zeros(2, 1, SIZE, dtype=torch.bfloat16),
            torch.zeros(2, 2 * SIZE),
        )
    with pytest.raises(ValueError, match="out_Cd must be"):
        seen.add_silu(torch.zeros(1, 2, SIZE), torch.zeros(SIZE), torch.zeros(2, SIZE), torch.zeros(3, SIZE))
