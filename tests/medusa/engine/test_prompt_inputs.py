"""What a pass over prompt chunks reads: its sizes, and that buffers which are used again keep nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from medusa.engine.prompt_inputs import NO_GRAPHS, PromptInputs, PromptShape, PromptShapes, padded
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
    shapes = PromptShapes.upto(64, 2560)
    assert shapes.of([100]) == PromptShape(1, 128, 128, has_graph=True)
    assert shapes.of([100, 3, 9]) == shapes.of([5, 117, 6]) == PromptShape(4, 128, 128, has_graph=True)
    assert shapes.of([64] * 8) == PromptShape(8, 512, 512, has_graph=True)


@pytest.mark.parametrize("sizes", [[1025], [1000, 100], [2] * 9])
def test_others_are_as_large_as_they_are_and_have_no_graph(sizes):
    expected = PromptShape(len(sizes), padded(sum(sizes)), padded(max(sizes)), has_graph=False)
    assert PromptShapes.upto(64, 2560).of(sizes) == NO_GRAPHS.of(sizes) == expected


@pytest.mark.parametrize(
    ("max_chunks", "max_tokens", "chunks", "tokens"),
    [
        (1, 512, (1,), (16, 32, 64, 128, 256, 512)),
        (3, 20, (1, 2, 4), (16, 32)),
        (64, 2560, (1, 2, 4, 8), (16, 32, 64, 128, 256, 512, 1024)),
    ],
)
def test_there_are_graphs_for_what_can_come_the_largest_first(max_chunks, max_tokens, chunks, tokens):
    shapes = PromptShapes.upto(max_chunks, max_tokens)
    assert (shapes.chunks, shapes.tokens) == (chunks, tokens)
    listed = [(shape.tokens, shape.chunks) for shape in shapes]
    assert listed == sorted(listed, reverse=True) and len(listed) == len(chunks) * len(tokens)
    assert all(shape == shapes.of([shape.tokens - shape.chunks + 1] + [1] * (shape.chunks - 1)) for shape in shapes)
    assert list(NO_GRAPHS) == []


def test_chunks_lie_one_after_another_with_padding_of_nobodys_behind():
    inputs = PromptInputs.empty(PromptShape(3, 16, 16), NOBODY, CPU)
    inputs.fill([chunk(3, 5, 11, 12), chunk(0, 0, 21), chunk(7, 64, 31, 32, 33)], NOBODY)
    drafts, visible = inputs.drafts(), inputs.visible(torch.zeros(10), torch.zeros(10, 2))
    assert drafts.tokens_M.tolist() == [11, 12, 21, 31, 32, 33, *[0] * 10]
    assert drafts.position_M.tolist() == [5, 6, 0, 64, 65, 66, *[0] * 10]
    assert drafts.row_M.tolist() == [3, 3, 0, 7, 7, 7, *[NOBODY] * 10]
    assert drafts.node_M.tolist() == [0, 1, 0, 0, 1, 2, *[0] * 10]
    assert visible.rows_B.tolist() == [3, 0, 7]
    assert visible.start_B.tolist() == [0, 2, 3]
    assert visible.count_B.tolist() == [2, 1, 3]
    assert inputs.length_B.tolist() == [5, 0, 64]


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 8])
def test_buffers_keep_nothing_of_the_pass_before(num_chunks):
    used, fresh = (PromptInputs.empty(PromptShape(num_chunks, 16, 16), NOBODY, CPU) for _ in range(2))
    used.fill([chunk(row, 8, 1, 2) for row in range(num_chunks)], NOBODY)
    for inputs in (used, fresh):
        inputs.fill([chunk(2, 1, 5)], NOBODY)
    for name in ("long_2M", "short_2M", "short_3C", "length_C", "valid_M"):
        assert torch.equal(getattr(used, name), getattr(fresh, name)), name
    visible = used.visible(torch.zeros(10), torch.zeros(10, 2))
    assert visible.rows_B.tolist() == [2, *[NOBODY] * (num_chunks - 1)]
    assert visible.count_B.tolist() == [1, *[0] * (num_chunks - 1)]


def test_rows_of_the_tables_begin_where_kernels_need_not_be_compiled_again():
    for num_chunks in range(1, 10):
        visible = PromptInputs.empty(PromptShape(num_chunks, 16, 16), NOBODY, CPU).visible(
            torch.zeros(1), torch.zeros(1)
        )
        assert all(column.data_ptr() % 16 == 0 for column in (visible.rows_B, visible.start_B, visible.count_B))
