"""The configuration of the train step: what is refused, and what makes another result of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medusa.config import ConfigError, validate
from medusa.training.schedule import HeadsLossConfig, JointConfig
from pipelines.train_config import TrainConfig
from tests.pipelines.test_train import CONFIG


def test_another_recipe_is_another_step_but_more_workers_are_not() -> None:
    assert replace(CONFIG, num_workers=2, max_failures=9, use_gpu=True).meaning == CONFIG.meaning
    slower = replace(CONFIG, trainer=replace(CONFIG.trainer, lr=1e-3))
    assert slower.meaning != CONFIG.meaning


def test_the_step_is_keyed_by_the_loss_that_is_trained() -> None:
    def keyed(**changes: object) -> object:
        return replace(CONFIG, trainer=replace(CONFIG.trainer, **changes)).meaning["trainer"]["loss"]

    assert keyed() == keyed(loss=HeadsLossConfig(kind="soft")) != keyed(loss=HeadsLossConfig(kind="tokens"))
    assert keyed(joint=JointConfig()) == keyed(loss=HeadsLossConfig(kind="tokens"))
    medusa = replace(CONFIG, heads=replace(CONFIG.heads, kind="medusa"))
    assert medusa.meaning != CONFIG.meaning


@pytest.mark.parametrize(
    "bad", [{"validation_fraction": 1.0}, {"num_workers": -1}, {"heads": {"truncated_vocab_size": 5}}]
)
def test_bad_config_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        validate(TrainConfig, bad, source="test")


def test_moments_that_cannot_be_sharded_are_refused_before_any_work() -> None:
    bad = {"sharding": "fsdp", "trainer": {"optimizer": "adamw_8bit"}}
    with pytest.raises(ConfigError, match="moments of trainer.optimizer adamw_8bit cannot be sharded; take adamw"):
        validate(TrainConfig, bad, source="test")
