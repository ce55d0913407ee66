"""What a pass over prompt chunks reads: its sizes, and that buffers which are used again keep nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch

from medusa.engine.prompt_inputs import PromptInputs, PromptShape, padded
from medusa.engine.step import PrefillChunk

CPU = torch.device("cpu")
NOBODY = 9


@dataclass
class Row:
    row: int


def chunk(row: int, start: int, *token_ids: int) -> PrefillChunk:
    return PrefillChunk(Row(row), start, list(token_ids), is_last=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 16), (16, 16), (17, 32), (300, 512), (512, 512), (513, 1024), (1025, 1536)]
)
def test_tokens_are_padded_to_few_sizes(size, expected):
    assert padded(size) == expected


def test_usual_passes_share_few_shapes_in_which_any_chunk_may_be_the_longest():
    assert PromptShape.of([100], graphs=True) == PromptShape(1, 128, 128, has_graph=True)
    assert PromptShape.of([100, 3, 9], graphs=True) == PromptShape.of([5, 117, 6], graphs=True)
    assert PromptShape.of([100, 3, 9], graphs=True) == PromptShape(4, 128, 128, has_graph=True)
    assert PromptShape.of([64] * 8, graphs=True) == PromptShape(8, 512, 512, has_graph=True)


@pytest.mark.parametrize("sizes", [[1025], [1000, 100], [2] * 9])
def test_others_are_as_large_as_they_are_and_have_no_graph(sizes):
    assert PromptShape.of(sizes, graphs=True) == PromptShape.of(sizes, graphs=False)
    shape = PromptShape.of(sizes, graphs=False)
    assert (shape.chunks, shape.tokens, shape.longest) == (len(sizes), padded(sum(sizes)), padded(max(sizes)))
    assert not shape.has_graph


def test_chunks_lie_one_after_another_with_padding_of_nobodys_behind():
    inputs = PromptInputs.empty(PromptShape.of_graph(4, 16), NOBODY, CPU)
    inputs.fill([chunk(3, 5, 11, 12), chunk(0, 0, 21), chunk(7, 64, 31, 32, 33)], NOBODY)
    drafts, visible = inputs.drafts(), inputs.visible(torch.zeros(10), torch.zeros(10, 2))
    assert drafts.tokens_M.tolist() == [11, 12, 21, 31, 32, 33, *[0] * 10]
    assert drafts.position_M.tolist() == [5, 6, 0, 64, 65, 66, *[0] * 10]
    assert drafts.row_M.tolist() == [3, 3, 0, 7, 7, 7, *[NOBODY] * 10]
    assert drafts.node_M.tolist() == [0, 1, 0, 0, 1, 2, *[0] * 10]
    assert visible.rows_B.tolist() == [3, 0, 7, NOBODY]
    assert visible.start_B.tolist() == [0, 2, 3, 0]
    assert visible.count_B.tolist() == [2, 1, 3, 0]
    assert inputs.length_B.tolist() == [5, 0, 64, 0]


def test_buffers_keep_nothing_of_the_pass_before():
    used, fresh = (PromptInputs.empty(PromptShape.of_graph(4, 16), NOBODY, CPU) for _ in range(2))
    used.fill([chunk(row, 8, *range(1, 5)) for row in range(4)], NOBODY)
    for inputs in (used, fresh):
        inputs.fill([chunk(2, 1, 5)], NOBODY)
    for field in fields(PromptInputs):
        assert torch.equal(getattr(used, field.name), getattr(fresh, field.name)), field.name
