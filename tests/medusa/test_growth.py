"""The grown tree: its order, its gains, and what old checkpoints and measured sizes make of them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from medusa import HeadsConfig, TokenTree
from medusa.calibration import ReplyGuesses, path_accuracy, tokens_per_step
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta
from medusa.growth import GrownTree, fit_gains, grown_tree, non_increasing
from medusa.tree import expected_tokens, grow, growth_order, ladder

ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.1, 0.05], [0.3, 0.1, 0.0]]
SIZES = [1, 4, 8, 16]


def meta(calibration: Calibration | None, trees: list[TokenTree]) -> CheckpointMeta:
    return CheckpointMeta(
        heads=HeadsConfig(hidden_size=8, vocab_size=32),
        backbone=BackboneRef(name="b", weights_digest="d"),
        calibration=calibration,
        trees=[tree.to_list() for tree in trees],
    )


def test_every_prefix_of_the_growth_order_is_the_grown_tree() -> None:
    order = growth_order(ACCURACY, 20)
    assert [TokenTree.from_paths(order[:n]) for n in range(20)] == [grow(ACCURACY, n + 1) for n in range(20)]


def test_a_grown_tree_knows_its_trees_and_expected_tokens() -> None:
    grown = GrownTree(((0,), (0, 0), (1,)), (0.5, 0.3, 0.2))
    assert grown.tree(1) == TokenTree.root()
    assert grown.tree(3) == TokenTree.from_paths([(0,), (0, 0)])
    assert grown.tokens_per_step == pytest.approx((1.0, 1.5, 1.8, 2.0))
    assert grown.max_nodes == 4


@pytest.mark.parametrize(
    ("paths", "gains", "problem"),
    [
        (((0,),), (0.5, 0.4), "1 paths came with 2 gains"),
        (((0,), (1,)), (0.4, 0.5), "gains must not rise"),
        (((0, 0), (0,)), (0.5, 0.4), "lacks its parent"),
    ],
)
def test_an_impossible_growth_is_refused(paths, gains, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        GrownTree(paths, gains)


def test_a_checkpoint_of_an_earlier_release_has_products_that_sum_to_the_measured_tokens() -> None:
    trees = ladder(ACCURACY, SIZES)
    measured = [1.0, 1.7, 1.85, 1.9]
    grown = grown_tree(meta(Calibration(accuracy=ACCURACY, num_positions=9, tokens_per_step=measured), trees))
    assert [grown.tree(size) for size in SIZES] == trees
    assert [grown.tokens_per_step[size - 1] for size in SIZES] == pytest.approx(measured)
    estimated = grown_tree(meta(Calibration(accuracy=ACCURACY, num_positions=9), trees))
    assert estimated.tokens_per_step[15] == pytest.approx(expected_tokens(trees[-1], ACCURACY))


def test_a_tree_made_by_hand_grows_by_the_value_of_its_nodes() -> None:
    tree = TokenTree.from_paths([(1,), (0,), (2,), (1, 1), (0, 1)])
    grown = grown_tree(meta(Calibration(accuracy=ACCURACY, num_positions=9), [tree]))
    assert grown.paths == ((0,), (1,), (2,), (0, 1), (1, 1))


def test_without_calibration_nothing_grows() -> None:
    assert grown_tree(meta(None, ladder(ACCURACY, SIZES))) is None
    assert grown_tree(meta(Calibration(accuracy=ACCURACY, num_positions=9), [])) is None


def dependent_replies(seed: int = 0) -> list[ReplyGuesses]:
    """Heads that are right together: in half of the places all guess well, in the other half none."""
    rng = random.Random(seed)
    replies = []
    for _ in range(60):
        reply = [rng.randrange(50) for _ in range(30)]
        guesses = []
        for i in range(30):
            easy = rng.random() < 0.5
            heads = []
            for k in range(3):
                truth = reply[i + k + 1] if i + k + 1 < 30 else 0
                ranks = [t for t in rng.sample(range(50), 4) if t != truth][:3]
                if rng.random() < (0.9 if easy else 0.1):
                    ranks[0 if rng.random() < 0.8 else 1] = truth
                heads.append(ranks)
            guesses.append(heads)
        replies.append(ReplyGuesses(reply, guesses))
    return replies


def test_path_accuracy_counts_whole_paths() -> None:
    item = ReplyGuesses([5, 6, 7, 8, 9], [[[6, 0], [7, 0]], [[0, 7], [8, 0]], [[8, 1], [0, 1]], [[9], [0]], [[0], [0]]])
    paths = [(0,), (1,), (0, 0), (1, 0), (1, 1)]
    assert path_accuracy([item], paths, num_heads=2) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 0])
    assert path_accuracy([], paths, num_heads=2) == [0.0] * 5


def test_gains_of_a_calibrated_checkpoint_follow_the_walk_where_products_do_not() -> None:
    replies = dependent_replies()
    accuracy = [[0.4, 0.1]] * 3
    order = growth_order(accuracy, 8)
    trees = ladder(accuracy, [1, 2, 4, 8])
    calibration = Calibration(
        accuracy=accuracy,
        num_positions=1,
        tokens_per_step=[tokens_per_step(replies, tree) for tree in trees],
        growth=[list(path) for path in order],
        path_accuracy=path_accuracy(replies, order, 3),
    )
    grown = grown_tree(meta(calibration, trees))
    for size in range(1, 9):
        walked = tokens_per_step(replies, grown.tree(size))
        assert grown.tokens_per_step[size - 1] == pytest.approx(walked, rel=0.03)
    assert expected_tokens(trees[-1], accuracy) < 0.95 * grown.tokens_per_step[7]


def test_calibration_refuses_paths_without_their_accuracy() -> None:
    with pytest.raises(ValueError, match="growth lists 1 paths, path_accuracy 0"):
        Calibration(accuracy=ACCURACY, num_positions=9, growth=[[0]])


def test_fitted_gains_sum_to_what_was_measured_and_keep_the_last_scale_beyond() -> None:
    fitted = fit_gains([0.4, 0.2, 0.1, 0.1], {1: 1.0, 3: 1.3})
    assert fitted == pytest.approx([0.2, 0.1, 0.05, 0.05])
    assert fit_gains([0.4, 0.0], {2: 1.2, 3: 1.4}) == pytest.approx([0.2, 0.0])


def test_levelled_values_never_rise_and_keep_their_sum() -> None:
    rng = random.Random(1)
    for _ in range(200):
        values = [rng.random() for _ in range(rng.randrange(1, 12))]
        level = non_increasing(values)
        assert all(later <= sooner for sooner, later in pairwise(level))
        assert sum(level) == pytest.approx(sum(values))
        if all(later <= sooner for sooner, later in pairwise(values)):
            assert level == values
    assert non_increasing([3.0, 1.0, 2.0, 0.0]) == [3.0, 1.5, 1.5, 0.0]
