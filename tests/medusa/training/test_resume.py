"""Training that goes on from a saved state: with the same numbers, or not at all."""

from __future__ import annotations

import pytest

from medusa.model import Backbone
from tests.medusa.training.test_trainer import make_rows, make_trainer, run


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_resume_from_saved_state_gives_bit_equal_losses(backbone, tmp_path, stop_at):
    undisturbed = run(make_trainer(backbone))
    first = make_trainer(backbone)
    before = run(first, steps=stop_at)
    first.save_state(tmp_path / "state")
    second = make_trainer(backbone)
    second.load_state(tmp_path / "state")
    assert second.step == stop_at and second.tokens_seen == first.tokens_seen
    assert before + run(second) == undisturbed
    assert len(undisturbed) == second.total_steps == 8


def test_resume_keeps_the_sums_of_an_unfinished_log_window(backbone, tmp_path):
    def window_of_four(trainer):
        while trainer.step < 4:
            metrics = trainer.train_step(trainer.next_batches())
        return trainer.take_record(metrics)

    undisturbed = window_of_four(make_trainer(backbone))
    first = make_trainer(backbone)
    for _ in range(2):
        first.train_step(first.next_batches())
    first.save_state(tmp_path / "state")
    second = make_trainer(backbone)
    second.load_state(tmp_path / "state")
    assert window_of_four(second) == undisturbed


def test_state_holds_no_pickle_and_is_not_overwritten(backbone, tmp_path):
    trainer = make_trainer(backbone)
    run(trainer, steps=1)
    trainer.save_state(tmp_path / "state")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["state", "state.json", "state.safetensors"]
    with pytest.raises(FileExistsError, match="already exists"):
        trainer.save_state(tmp_path / "state")


def test_state_of_other_rows_or_batches_is_refused(backbone, tmp_path):
    make_trainer(backbone).save_state(tmp_path / "state")
    with pytest.raises(ValueError, match="same rows, batch size and seed"):
        make_trainer(backbone, batch_size=4).load_state(tmp_path / "state")
    with pytest.raises(ValueError, match="same rows, batch size and seed"):
        make_trainer(backbone, make_rows(29)).load_state(tmp_path / "state")
