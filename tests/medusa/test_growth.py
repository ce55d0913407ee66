"""The grown tree: its order, its gains, and what old checkpoints and measured sizes make of them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from medusa import HeadsConfig, TokenTree
from medusa.calibration import ReplyGuesses, grow_on, head_accuracy, tokens_per_step
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta
from medusa.growth import GrownTree, fit_gains, grown_tree, non_increasing
from medusa.tree import expected_tokens, grow, grow_in_order, ladder

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
    growth = grow_in_order([3, 3, 3], lambda path: ACCURACY[len(path) - 1][path[-1]], 20)
    order = [path for path, _ in growth]
    assert [TokenTree.from_paths(order[:n]) for n in range(20)] == [grow(ACCURACY, n + 1) for n in range(20)]
    assert [value for _, value in growth] == sorted((value for _, value in growth), reverse=True)


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


def dependent_replies(seed: int = 0, count: int = 60) -> list[ReplyGuesses]:
    """Heads that are right together: in half of the places all guess well, in the other half none."""
    rng = random.Random(seed)
    replies = []
    for _ in range(count):
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


def test_growth_counts_whole_paths_where_steps_begin() -> None:
    guesses = [
        [[6, 0], [0, 1]],  # of 6, 7: right and wrong, so that the step gives 6 and 7
        [[7, 0], [8, 0]],  # no step begins here
        [[0, 8], [9, 0]],  # of 8, 9: second and first guess; the step gives 8, 9 and 10
        [[9, 0], [10, 0]],
        [[10, 0], [11, 0]],
        [[11, 0], [0, 1]],  # of 11 and the end of the reply: not counted
        [[0, 1], [0, 1]],
    ]
    many = [ReplyGuesses([5, 6, 7, 8, 9, 10, 11], guesses)] * 4000  # so that the prior does not matter
    paths, values = grow_on(many, [[0.8, 0.2], [0.6, 0.0]], 9)
    assert dict(zip(paths, values, strict=True)) == {
        (0,): pytest.approx(0.5, abs=1e-3),
        (1,): pytest.approx(0.5, abs=1e-3),
        (1, 0): pytest.approx(0.5, abs=1e-3),
        (0, 0): pytest.approx(0.0, abs=1e-3),
    }


def test_paths_seen_too_rarely_grow_by_the_heads_accuracies() -> None:
    accuracy = [[0.5, 0.3], [0.4, 0.2]]
    paths, values = grow_on([], accuracy, 7)
    assert TokenTree.from_paths(paths) == grow(accuracy, 7)
    assert sum(values) == pytest.approx(expected_tokens(grow(accuracy, 7), accuracy) - 1)


def test_a_tree_grown_on_whole_paths_is_as_good_as_any_grown_on_accuracies() -> None:
    """Also on replies that it has not seen."""
    seen, unseen = dependent_replies(1, count=300), dependent_replies(2, count=300)
    accuracy, _ = head_accuracy(seen, 3, 3)
    paths, _ = grow_on(seen, accuracy, 12)
    gains = [
        tokens_per_step(unseen, TokenTree.from_paths(paths[: size - 1])) - tokens_per_step(unseen, grow(accuracy, size))
        for size in (3, 4, 6, 8, 12)
    ]
    assert min(gains) > -0.02 and sum(gains) > 0


def test_gains_of_a_calibrated_checkpoint_follow_the_walk_where_products_do_not() -> None:
    replies = dependent_replies()
    accuracy, positions = head_accuracy(replies, 3, 3)
    paths, values = grow_on(replies, accuracy, 8)
    trees = [TokenTree.from_paths(paths[: size - 1]) for size in (1, 2, 4, 8)]
    calibration = Calibration(
        accuracy=accuracy,
        num_positions=positions,
        tokens_per_step=[tokens_per_step(replies, tree) for tree in trees],
        growth=[list(path) for path in paths],
        path_accuracy=values,
    )
    grown = grown_tree(meta(calibration, trees))
    for size in range(1, 9):
        walked = tokens_per_step(replies, grown.tree(size))
        assert grown.tokens_per_step[size - 1] == pytest.approx(walked, rel=0.03)
    assert abs(expected_tokens(trees[-1], accuracy) / grown.tokens_per_step[7] - 1) > 0.05


def test_calibration_refuses_paths_without_their_accuracy() -> None:
    with pytest.raises(ValueError, match="growth lists 1 paths, path_accuracy 0"):
        Calibration(accuracy=ACCURACY, num_positions=9, growth=[[0]])


def test_a_growth_beyond_the_largest_tree_is_refused() -> None:
    """An engine makes room for the trees of the ladder; the policy takes those of the growth."""
    calibration = Calibration(accuracy=ACCURACY, num_positions=9, growth=[[0], [1]], path_accuracy=[0.5, 0.2])
    meta(calibration, [TokenTree.root(), TokenTree.from_paths([(0,), (1,)])])
    with pytest.raises(ValueError, match=r"growth lists \[\[1\]\], which the largest of the trees does not have"):
        meta(calibration, [TokenTree.from_paths([(0,), (0, 0), (0, 1)])])


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
