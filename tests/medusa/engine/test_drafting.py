"""The ladder of trees that heads come with."""

from __future__ import annotations

from medusa import TokenTree
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta
from medusa.engine.drafting import ladder_of
from medusa.heads import HeadsConfig
from tests.medusa.engine.support import ACCURACY, TREES

ROOT = TokenTree.root()


def meta(trees, **calibration):
    return CheckpointMeta(
        heads=HeadsConfig(hidden_size=8, vocab_size=32),
        backbone=BackboneRef(name="b", weights_digest="d"),
        calibration=Calibration(accuracy=ACCURACY, num_positions=9, **calibration) if calibration else None,
        trees=[tree.to_list() for tree in trees],
    )


def test_the_ladder_is_sorted_and_always_has_the_root():
    assert ladder_of(meta([TREES[16], TREES[4]], temperature=0.0)) == (ROOT, TREES[4], TREES[16])
    assert ladder_of(meta([ROOT, TREES[4]], tokens_per_step=[1.0, 1.7])) == (ROOT, TREES[4])


def test_heads_without_calibration_have_no_ladder():
    assert ladder_of(meta([TREES[4]])) == ()
