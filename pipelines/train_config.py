"""What the train step is told: which heads, trained how, on how many workers; and which of that decides its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from medusa.config import strict, to_dict
from medusa.heads import HeadsConfig, Vocabulary
from medusa.training.schedule import TrainerConfig

# What may change at a restart: it moves results by rounding at most.
_NOT_IN_KEY = {"num_workers", "min_workers", "use_gpu", "cpus_per_worker", "max_failures", "sharding"}
_NOT_IN_TRAINER_KEY = {
    "micro_batch_size",
    "chunk_size",
    "hidden_cache_gib",
    "hidden_cache_on",
    "checkpoint_every",
    "packing",
    "activation_checkpointing",
    "cross_entropy",
}


@strict
@dataclass(frozen=True, kw_only=True)
class HeadsChoice:
    """The heads to train; their sizes come from the backbone.

    `kind` "hydra": heads that see the tokens guessed before them (medusa/hydra.py), which gave most tokens a step
    (docs/results.md, "Training recipes on chat-28m"). "medusa": the paper's, the only ones that other engines load.
    """

    kind: Literal["medusa", "hydra"] = "hydra"
    num_heads: int = 4
    num_layers: int = 1
    vocabulary: Vocabulary = "own"
    truncated_vocab_size: int | None = None

    def __post_init__(self) -> None:
        self.on(hidden_size=1, vocab_size=self.truncated_vocab_size or 1)

    def on(self, hidden_size: int, vocab_size: int) -> HeadsConfig:
        shape = {name: value for name, value in to_dict(self).items() if name != "kind"}
        return HeadsConfig(hidden_size=hidden_size, vocab_size=vocab_size, **shape)


@strict
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained, how, and on how many workers.

    `num_workers` 0: in this process. With `min_workers` training starts, and goes on, with as many as there is room for
    from that number up; how many they are changes no result beyond rounding. `use_gpu` null: where there are GPUs.
    `validation_fraction` of the conversations, chosen by id, is kept back for calibration, and `validation_rows` of
    their rows at most are measured every `validate_every` steps (0: never). A worker that dies `max_failures` times
    ends the run.
    `quantization` freezes a backbone of 8 or 4 bits (Medusa-1 only; needs bitsandbytes). `sharding` "fsdp" splits
    model, heads and optimiser over the workers, where one GPU does not hold them; "ddp" gives each its own.
    """

    heads: HeadsChoice = field(default_factory=HeadsChoice)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    num_workers: int = 1
    min_workers: int | None = None
    use_gpu: bool | None = None
    cpus_per_worker: float = 1.0
    validation_fraction: float = 0.05
    validate_every: int = 0
    validation_rows: int = 256
    quantization: Literal["8bit", "4bit"] | None = None
    sharding: Literal["ddp", "fsdp"] = "ddp"
    max_failures: int = 3

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.max_failures < 0 or self.cpus_per_worker <= 0:
            raise ValueError(
                "num_workers and max_failures must be 0 or more and cpus_per_worker above 0, got "
                f"{self.num_workers}, {self.max_failures} and {self.cpus_per_worker}"
            )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers must be from 1 to num_workers ({self.num_workers}), got {self.min_workers}; leave it out "
                "for a fixed number"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be from 0 to below 1, got {self.validation_fraction}")
        if self.validate_every < 0 or self.validation_rows < 1:
            raise ValueError(
                f"validate_every must be 0 or more and validation_rows at least 1, got {self.validate_every} and "
                f"{self.validation_rows}"
            )
        if self.sharding == "fsdp" and self.trainer.optimizer != "adamw":
            raise ValueError(
                f"sharding is fsdp, and the moments of trainer.optimizer {self.trainer.optimizer} cannot be sharded; "
                "take adamw, or sharding ddp"
            )
        if self.quantization is not None and self.trainer.joint is not None:
            raise ValueError(
                f"quantization is {self.quantization} in joint training, whose teacher would then be the quantised "
                "model; set quantization to null"
            )

    @property
    def recipe(self) -> dict[str, Any]:
        """Every value, with the loss that is taken where none was chosen: a default may change, a record may not."""
        values = to_dict(self)
        return values | {"trainer": values["trainer"] | {"loss": to_dict(self.trainer.heads_loss)}}

    @property
    def meaning(self) -> dict[str, Any]:
        """What decides the result, beyond rounding."""
        values = {name: value for name, value in self.recipe.items() if name not in _NOT_IN_KEY}
        trainer = {name: value for name, value in values["trainer"].items() if name not in _NOT_IN_TRAINER_KEY}
        return values | {"trainer": trainer}
