"""Labels, collation and the sampler. Tests named `test_pitfall_...` stand for a fault known from other trainers."""

from __future__ import annotations

import random

import pytest
import torch

from medusa.training.batch import IGNORE, PAD_ID, EpochSampler, Row, collate, fit_rows, make_labels

NUM_HEADS = 3


def labels_by_hand(token_ids, prompt_length, num_heads):
    """Slicing as one would write it for a single row, position by position."""
    labels = []
    for t in range(len(token_ids)):
        ahead = range(t + 2, t + 2 + num_heads)
        in_serving = t >= prompt_length - 1
        labels.append([token_ids[p] if in_serving and prompt_length <= p < len(token_ids) else IGNORE for p in ahead])
    return labels


def random_rows(seed, count=40, longest=9):
    rng = random.Random(seed)
    rows, next_id = [], 1
    for _ in range(count):
        prompt, reply = rng.randint(1, longest), rng.randint(0, longest)
        ids = list(range(next_id, next_id + prompt + reply))  # every token of the set has its own id
        next_id += prompt + reply
        rows.append(Row.of(ids[:prompt], ids[prompt:]))
    return rows


def padded_labels(rows, num_heads):
    longest = max(len(row) for row in rows)
    tokens_BT = torch.full((len(rows), longest), PAD_ID)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row.token_ids
        mask_BT[b, row.prompt_length : len(row)] = True
    return make_labels(tokens_BT, mask_BT, num_heads)


def test_labels_unfolded_equal_labels_sliced_by_hand():
    for seed in range(5):
        rows = random_rows(seed)
        labels_BTK = padded_labels(rows, NUM_HEADS)
        for b, row in enumerate(rows):
            by_hand = labels_by_hand(row.token_ids.tolist(), row.prompt_length, NUM_HEADS)
            assert labels_BTK[b, : len(row)].tolist() == by_hand
            assert (labels_BTK[b, len(row) :] == IGNORE).all()


def test_pitfall_loss_mask_no_op_prompt_padding_and_after_end_are_never_labels():
    for seed in range(20):
        rows = random_rows(seed)
        replies = set().union(*(row.token_ids[row.prompt_length :].tolist() for row in rows))
        batch = collate(rows, range(len(rows)), NUM_HEADS)
        labels = batch.labels_NK[batch.labels_NK != IGNORE].tolist()
        assert set(labels) <= replies and PAD_ID not in labels
        learnt = set().union(*(row.token_ids[row.prompt_length + 1 :].tolist() for row in rows))
        assert set(labels) == learnt  # all but each reply's first token, which is the LM head's alone


def test_pitfall_mask_not_shifted_each_head_is_masked_by_its_own_label():
    labels_BTK = padded_labels([Row.of([1, 2], [3, 4, 5, 6])], NUM_HEADS)
    assert labels_BTK[0].tolist() == [
        [IGNORE, IGNORE, IGNORE],  # before the last prompt token: never a position of serving
        [4, 5, 6],
        [5, 6, IGNORE],
        [6, IGNORE, IGNORE],
        [IGNORE, IGNORE, IGNORE],
        [IGNORE, IGNORE, IGNORE],
    ]


def test_pitfall_packing_label_never_crosses_a_sample_boundary():
    first, second = Row.of([1, 2], [3, 4, 5]), Row.of([11], [12, 13, 14])
    packed_T = torch.cat([first.token_ids, second.token_ids])
    mask_T = torch.tensor([False, False, True, True, True, False, True, True, True])
    labels_TK = make_labels(packed_T[None], mask_T[None], NUM_HEADS)[0]
    alone = [padded_labels([row], NUM_HEADS)[0] for row in (first, second)]
    assert labels_TK.tolist() == torch.cat(alone).tolist()


def test_pitfall_truncated_reply_gets_no_false_end():
    end = 2
    rows, counts = fit_rows([Row.of([5, 6], [7, 8, 9, end])], max_length=5)
    assert collate(rows, [0], NUM_HEADS).labels_NK.tolist() == [[8, 9, IGNORE], [9, IGNORE, IGNORE], [IGNORE] * 3]
    assert (counts.truncated, counts.tokens_cut) == (1, 1)


def test_truncation_and_rows_without_labels_are_counted():
    rows = [
        Row.of([1] * 4, [2] * 4),
        Row.of([1] * 9, [2] * 4),
        Row.of([1], []),
        Row.of([1], [2]),
        Row.of([1], [2, 3]),
    ]
    kept, counts = fit_rows(rows, max_length=6)
    assert [len(row) for row in kept] == [6, 3]
    assert (counts.read, counts.kept, counts.without_labels) == (5, 2, 3)
    assert (counts.truncated, counts.tokens_cut) == (2, 9)


def test_row_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt of at least one token"):
        Row.of([], [1, 2])


def test_collate_keeps_exactly_the_positions_that_predict_a_reply_token_in_row_order():
    rows = random_rows(3)
    indices = [5, 0, 17]
    batch = collate(rows, indices, NUM_HEADS)
    labels_BTK = padded_labels([rows[i] for i in indices], NUM_HEADS)
    by_hand = [(b, t) for b, i in enumerate(indices) for t in range(rows[i].prompt_length - 1, len(rows[i]) - 1)]
    assert batch.labels_NK.tolist() == [labels_BTK[b, t].tolist() for b, t in by_hand]
    assert batch.next_N.tolist() == [rows[indices[b]].token_ids[t + 1].item() for b, t in by_hand]
    assert (batch.labels_NK != IGNORE).sum() == (labels_BTK != IGNORE).sum()
    assert batch.positions_per_row == tuple(rows[i].num_positions for i in indices)


def test_ahead_are_the_tokens_that_each_head_follows():
    row = Row.of([1, 2], [3, 4, 5, 6])
    ahead_NK = collate([row], [0], NUM_HEADS).ahead_NK
    assert ahead_NK.tolist() == [[3, 4, 5], [4, 5, 6], [5, 6, 0], [6, 0, 0]]


def test_collate_of_no_rows_is_padding_without_labels():
    batch = collate([], [], NUM_HEADS)
    assert batch.tokens_BT.shape == (1, 1) and batch.labels_NK.shape == (0, NUM_HEADS)


@pytest.mark.parametrize("num_rows", [1, 7, 64, 65])
def test_every_row_once_an_epoch_and_another_order_the_next(num_rows):
    sampler = EpochSampler(num_rows, 4, seed=1, lengths=[i % 10 for i in range(num_rows)], bucket_batches=4)
    epochs = [
        [row for step in range(sampler.steps_per_epoch) for row in sampler(epoch * sampler.steps_per_epoch + step)]
        for epoch in range(2)
    ]
    assert [sorted(rows) for rows in epochs] == [list(range(num_rows))] * 2
    assert num_rows < 64 or epochs[0] != epochs[1]


def test_sampler_is_a_pure_function_of_the_step():
    first, second = (EpochSampler(50, 8, seed=3, lengths=range(50)) for _ in range(2))
    in_order = [first(step) for step in range(20)]
    backwards = [second(step) for step in reversed(range(20))]
    assert in_order == backwards[::-1]
    assert in_order != [EpochSampler(50, 8, seed=4, lengths=range(50))(step) for step in range(20)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_split_the_same_global_batches(world_size):
    alone = EpochSampler(29, 8, seed=0)
    ranks = [EpochSampler(29, 8, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(8):
        parts = [rank(step) for rank in ranks]
        assert sorted(sum(parts, [])) == sorted(alone(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_buckets_keep_padding_low():
    rng = random.Random(0)
    lengths = [rng.randint(10, 400) for _ in range(512)]

    def padded_tokens(sampler):
        batches = [sampler(step) for step in range(sampler.steps_per_epoch)]
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    bucketed = padded_tokens(EpochSampler(512, 8, seed=0, lengths=lengths))
    shuffled = padded_tokens(EpochSampler(512, 8, seed=0))
    assert bucketed < 1.1 * sum(lengths) < 1.5 * sum(lengths) < shuffled


@pytest.mark.parametrize("arguments", [(0, 1, 0), (4, 0, 0), (4, 2, 0, 2, 2)])
def test_sampler_refuses_impossible_sizes(arguments):
    with pytest.raises(ValueError, match="got"):
        EpochSampler(*arguments)
