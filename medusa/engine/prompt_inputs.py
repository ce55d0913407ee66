"""What a pass over prompt chunks reads, in buffers that stay where they are, so that a graph can hold the pass.

Shapes: B chunks, M tokens of all chunks, both with padding; C chunks that there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator
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
MOST_TOKENS = 1024  # of a graph: in larger passes arithmetic outweighs the launches
CHUNKS = (1, 2, 4, 8)
ALIGNED = 4  # numbers of 32 bits: kernels are compiled again where rows of a table begin at other places


@dataclass(frozen=True)
class PromptShape:
    """Chunks, tokens of all chunks, and most tokens of one, as padded; whether a graph of that shape is kept."""

    chunks: int
    tokens: int
    longest: int
    has_graph: bool = False


@dataclass(frozen=True)
class PromptShapes:
    """Of chunks and tokens there are a few sizes with graphs; any chunk of such a pass may be the longest."""

    chunks: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def upto(cls, max_chunks: int, max_tokens: int) -> PromptShapes:
        """What passes of up to so many chunks and tokens can need."""
        tokens = dict.fromkeys(padded(size) for size in range(1, min(max_tokens, MOST_TOKENS) + 1))
        fewer = [size for size in CHUNKS if size < max_chunks]
        return cls((*fewer, *CHUNKS[len(fewer) : len(fewer) + 1]), tuple(tokens))

    def __iter__(self) -> Iterator[PromptShape]:
        """Those with graphs, the largest first: the others find room in what it left."""
        for tokens in reversed(self.tokens):
            for chunks in reversed(self.chunks):
                yield PromptShape(chunks, tokens, tokens, has_graph=True)

    def of(self, sizes: Items[int]) -> PromptShape:
        """The smallest that holds chunks of so many tokens."""
        tokens = padded(sum(sizes))
        chunks = next((chunks for chunks in self.chunks if len(sizes) <= chunks), None)
        if chunks is None or tokens not in self.tokens:
            return PromptShape(len(sizes), tokens, padded(max(sizes)))
        return PromptShape(chunks, tokens, tokens, has_graph=True)


NO_GRAPHS = PromptShapes((), ())


@dataclass(frozen=True)
class PromptInputs:
    """Tokens and positions; rows and nodes; each chunk's row, first token and size; the committed tokens before it.
    The tables by chunk have room for a few more than the shape's."""

    shape: PromptShape
    long_2M: torch.Tensor
    short_2M: torch.Tensor
    short_3C: torch.Tensor
    length_C: torch.Tensor
    valid_M: torch.Tensor

    @classmethod
    def empty(cls, shape: PromptShape, nobody: int, device: torch.device) -> PromptInputs:
        """A pass of nobody: every token belongs to the row `nobody`, and no chunk has any."""

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        room = rounded_up(shape.chunks, ALIGNED)
        inputs = cls(
            shape,
            long_2M=zeros(2, shape.tokens, dtype=torch.int64),
            short_2M=zeros(2, shape.tokens, dtype=torch.int32),
            short_3C=zeros(3, room, dtype=torch.int32),
            length_C=zeros(room, dtype=torch.int64),
            valid_M=torch.ones(shape.tokens, dtype=torch.int32, device=device),
        )
        inputs.short_2M[0].fill_(nobody)
        inputs.short_3C[0].fill_(nobody)
        return inputs

    def fill(self, chunks: Items[PrefillChunk], nobody: int) -> None:
        """These chunks, and padding of nobody's behind them."""
        sizes = [len(chunk.token_ids) for chunk in chunks]
        spare, absent = self.shape.tokens - sum(sizes), len(self.length_C) - len(chunks)
        tokens = [token for chunk in chunks for token in chunk.token_ids] + [0] * spare
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)] + [0] * spare
        rows = [chunk.sequence.row for chunk in chunks for _ in chunk.token_ids] + [nobody] * spare
        nodes = [node for size in sizes for node in range(size)] + [0] * spare
        chunk_rows = [*(chunk.sequence.row for chunk in chunks), *[nobody] * absent]
        starts = [*(sum(sizes[:b]) for b in range(len(sizes))), *[0] * absent]
        self._copy(self.long_2M, [*tokens, *positions])
        self._copy(self.short_2M, [*rows, *nodes])
        self._copy(self.short_3C, [*chunk_rows, *starts, *sizes, *[0] * absent])
        self._copy(self.length_C, [*(chunk.start for chunk in chunks), *[0] * absent])

    @property
    def length_B(self) -> torch.Tensor:
        return self.length_C[: self.shape.chunks]

    def drafts(self) -> Drafts:
        (tokens_M, position_M), (row_M, node_M) = self.long_2M, self.short_2M
        return Drafts(tokens_M, position_M, row_M, node_M, self.valid_M, self.short_3C[1, : self.shape.chunks])

    def visible(self, length_R: torch.Tensor, tables_RP: torch.Tensor) -> Visible:
        rows_B, start_B, count_B = self.short_3C[:, : self.shape.chunks]
        return Visible(rows_B, start_B, count_B, length_R, tables_RP, None, None)

    @staticmethod
    def _copy(buffer: torch.Tensor, values: list[int]) -> None:
        buffer.copy_(staged(values, buffer.dtype, buffer.device).view(buffer.shape), non_blocking=True)


def padded(size: int) -> int:
    """The smallest power of two, from SMALLEST on, that holds so many; above STEP multiples of STEP."""
    if size > STEP:
        return rounded_up(size, STEP)
    return max(SMALLEST, 1 << (size - 1).bit_length())
