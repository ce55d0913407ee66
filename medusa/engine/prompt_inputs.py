"""What a pass over prompt chunks reads, in buffers that stay where they are, so that a graph can hold the pass.

Shapes: B chunks, M tokens of all chunks; both include padding.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from medusa.engine.shapes import rounded_up
from medusa.engine.staging import staged
from medusa.engine.step import PrefillChunk
from medusa.kernels.attention_plan import Visible
from medusa.kernels.state import Drafts

SMALLEST = 16  # tokens that a pass is padded to; then powers of two
STEP = 512  # tokens from which it is padded to multiples of this
GRAPH_TOKENS = (16, 32, 64, 128, 256, 512, 1024)  # a larger pass takes longer than its launches one by one
GRAPH_CHUNKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class PromptShape:
    """Chunks, tokens of all chunks, and most tokens of one, as padded; whether a graph of that shape is kept."""

    chunks: int
    tokens: int
    longest: int
    has_graph: bool

    @classmethod
    def of(cls, sizes: Items[int], *, graphs: bool) -> PromptShape:
        """The smallest that holds chunks of so many tokens. With `graphs`, of few shapes: any chunk of such a pass may
        be the longest."""
        tokens = padded(sum(sizes))
        if graphs and tokens <= GRAPH_TOKENS[-1] and len(sizes) <= GRAPH_CHUNKS[-1]:
            return cls.of_graph(next(chunks for chunks in GRAPH_CHUNKS if len(sizes) <= chunks), tokens)
        return cls(len(sizes), tokens, padded(max(sizes)), has_graph=False)

    @classmethod
    def of_graph(cls, chunks: int, tokens: int) -> PromptShape:
        return cls(chunks, tokens, tokens, has_graph=True)


@dataclass(frozen=True)
class PromptInputs:
    """Tokens and positions; rows and nodes; each chunk's row, first token and size; the committed tokens before it."""

    long_2M: torch.Tensor
    short_2M: torch.Tensor
    short_3B: torch.Tensor
    length_B: torch.Tensor
    valid_M: torch.Tensor

    @classmethod
    def empty(cls, shape: PromptShape, nobody: int, device: torch.device) -> PromptInputs:
        """A pass of nobody: every token belongs to the row `nobody`, and no chunk has any."""

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        inputs = cls(
            long_2M=zeros(2, shape.tokens, dtype=torch.int64),
            short_2M=zeros(2, shape.tokens, dtype=torch.int32),
            short_3B=zeros(3, shape.chunks, dtype=torch.int32),
            length_B=zeros(shape.chunks, dtype=torch.int64),
            valid_M=torch.ones(shape.tokens, dtype=torch.int32, device=device),
        )
        inputs.short_2M[0].fill_(nobody)
        inputs.short_3B[0].fill_(nobody)
        return inputs

    def fill(self, chunks: Items[PrefillChunk], nobody: int) -> None:
        """These chunks, and padding of nobody's behind them."""
        sizes = [len(chunk.token_ids) for chunk in chunks]
        spare = self.valid_M.shape[0] - sum(sizes)
        tokens = [token for chunk in chunks for token in chunk.token_ids] + [0] * spare
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)] + [0] * spare
        rows = [chunk.sequence.row for chunk in chunks for _ in chunk.token_ids] + [nobody] * spare
        nodes = [node for size in sizes for node in range(size)] + [0] * spare
        starts = [sum(sizes[:b]) for b in range(len(sizes))]
        absent = self.length_B.shape[0] - len(chunks)
        chunk_rows = [*(chunk.sequence.row for chunk in chunks), *[nobody] * absent]
        self._copy(self.long_2M, [*tokens, *positions])
        self._copy(self.short_2M, [*rows, *nodes])
        self._copy(self.short_3B, [*chunk_rows, *starts, *[0] * absent, *sizes, *[0] * absent])
        self._copy(self.length_B, [*(chunk.start for chunk in chunks), *[0] * absent])

    def drafts(self) -> Drafts:
        (tokens_M, position_M), (row_M, node_M) = self.long_2M, self.short_2M
        return Drafts(tokens_M, position_M, row_M, node_M, self.valid_M, self.short_3B[1])

    def visible(self, length_R: torch.Tensor, tables_RP: torch.Tensor) -> Visible:
        rows_B, start_B, count_B = self.short_3B
        return Visible(rows_B, start_B, count_B, length_R, tables_RP, None, None)

    @staticmethod
    def _copy(buffer: torch.Tensor, values: list[int]) -> None:
        buffer.copy_(staged(values, buffer.dtype, buffer.device).view(buffer.shape), non_blocking=True)


def padded(size: int) -> int:
    """The smallest power of two, from SMALLEST on, that holds so many; above STEP multiples of STEP."""
    if size > STEP:
        return rounded_up(size, STEP)
    return max(SMALLEST, 1 << (size - 1).bit_length())
