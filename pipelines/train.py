"""The train step: draft heads on the model's own replies, by Ray Train workers, resumed where it stopped.

    <step dir>/checkpoint/     the heads (medusa/checkpoint.py), with the adapter where the backbone learnt by LoRA
    <step dir>/backbone/       Medusa-2: the model that the heads run on, merged; the later steps use it
    <step dir>/metrics.jsonl   a record every `log_every` steps: losses and accuracies by head, rate, tokens/s, system
    <step dir>/curves.png      the same drawn
    <step dir>/.ray/           Ray Train's own storage while the step runs: the trainer's states

The run's name is the step's key, so a step that is run again goes on from Ray's last checkpoint, and a changed
config can never pick up another's. With `num_workers` 0 all happens in this process, without Ray.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from medusa.config import strict, to_dict
from medusa.heads import HeadsConfig, Vocabulary
from medusa.tokenizer import ChatTokenizer
from medusa.training.batch import Row, fit_rows
from medusa.training.schedule import TrainerConfig
from medusa.weights import model_directory, weights_digest
from pipelines.artifact import StepDir, StepOutput, open_step
from pipelines.curves import CURVES, draw_curves
from pipelines.distill import DATA
from pipelines.journal import RunLog
from pipelines.progress import Advance
from pipelines.tracking import TrackingUnavailable
from pipelines.train_worker import (
    BACKBONE,
    CHECKPOINT,
    METRICS,
    STATES,
    TrainJob,
    TrainOutcome,
    read_records,
    read_rows,
    train_here,
    train_on_ray,
)

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 2
RAY = ".ray"
_POLL_S, _TAIL_BYTES = 0.5, 1 << 16
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


class TrainError(RuntimeError):
    """Training cannot go on; the message says why and what to do. What was checkpointed is kept."""


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


def train(
    context: RunContext,
    config: TrainConfig,
    distilled: StepOutput,
    *,
    on_step: Callable[[int], None] | None = None,
) -> StepOutput:
    """Runs the step, or what is left of it. Ray must be initialised unless `num_workers` is 0.

    `on_step` is called in every worker with the number of steps done. TrainError when the run cannot be ended.
    """
    directory = model_directory(context.model.backbone)
    inputs = {
        "distill": distilled.digest,
        "backbone": weights_digest(directory),
        "dtype": str(context.model.dtype),
    }
    with (
        open_step(context.root, "train", STEP_VERSION, config.meaning, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        log.log_params(config.recipe)
        log.log_dataset("distilled", distilled.digest, str(distilled.path))
        rows, counts = _fitted_rows(distilled.path / DATA, config)
        tokenizer = ChatTokenizer.from_pretrained(directory)
        job = TrainJob(
            backbone=_as_seen_by_workers(context.model.backbone),
            dtype=context.model.dtype,
            tokenizer_digest=tokenizer.digest,
            table=distilled.path / DATA,
            step_folder=step.path,
            config=config,
            use_gpu=_uses_gpu(config),
            token_map=_token_map(config.heads, rows, tokenizer.eos_token_ids),
            training=_provenance(context, config, distilled, log),
            log=log,
            on_step=on_step,
        )
        total_steps = config.trainer.total_steps(-(-len(rows) // config.trainer.batch_size))
        with context.bar("train", total_steps) as advance, _following(step.path / METRICS, advance):
            outcome = train_here(job) if config.num_workers == 0 else _fit(job)
        if outcome.failure is not None:
            raise TrainError(outcome.failure)
        draw_curves(read_records(step.path / METRICS), step.path / CURVES)
        output = _commit(step, outcome, counts)
        log.log_artifact(step.path / CHECKPOINT, CHECKPOINT)
        log.log_artifact(step.path / CURVES)
        for folder in (RAY, STATES):
            shutil.rmtree(step.path / folder, ignore_errors=True)
        return output


def _fitted_rows(table: Path, config: TrainConfig) -> tuple[list[Row], dict[str, int]]:
    """The rows as the workers will train on them, and what became of all rows of the table."""
    read, held_back = read_rows(table, config.validation_fraction)
    rows, counts = fit_rows(read, config.trainer.max_length)
    if not rows:
        raise TrainError(
            f"{table} gives nothing to learn: {len(held_back)} rows kept back (validation_fraction "
            f"{config.validation_fraction}), {counts.without_labels} without a label within max_length "
            f"{config.trainer.max_length}; distil more or longer replies"
        )
    return rows, {**asdict(counts), "held_back": len(held_back)}


def _as_seen_by_workers(backbone: str) -> str:
    """Workers have a working directory of their own; a hub id is the same everywhere."""
    return str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone


def frequent_reply_tokens(rows: Sequence[Row], size: int, always: Sequence[int] = ()) -> tuple[int, ...]:
    """The `size` tokens that replies use most, `always` among them, as ascending ids; ties go to lower ids."""
    replies = torch.cat([row.token_ids[row.prompt_length :] for row in rows])
    counts_V = torch.bincount(replies, minlength=max(size, *always, 0) + 1)
    counts_V[list(always)] = len(replies) + 1
    return tuple(sorted(counts_V.argsort(descending=True, stable=True)[:size].tolist()))


def _token_map(heads: HeadsChoice, rows: Sequence[Row], eos: frozenset[int]) -> tuple[int, ...] | None:
    if heads.truncated_vocab_size is None:
        return None
    return frequent_reply_tokens(rows, heads.truncated_vocab_size, sorted(eos))


def _fit(job: TrainJob) -> TrainOutcome:
    config = job.config
    trainer = TorchTrainer(
        train_on_ray,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers),
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if job.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=job.step_folder.name,
            storage_path=str(job.step_folder / RAY),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        outcome: TrainOutcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise TrainError(
            f"training failed more than max_failures={config.max_failures} times; run the same command again to go "
            f"on from the last checkpoint. {error}"
        ) from error
    return outcome


def _uses_gpu(config: TrainConfig) -> bool:
    if config.use_gpu is not None:
        return config.use_gpu
    if config.num_workers == 0:
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= (config.min_workers or config.num_workers))


def _provenance(context: RunContext, config: TrainConfig, distilled: StepOutput, log: RunLog) -> dict[str, Any]:
    try:
        mlflow_run = context.tracker.run_id(log)
    except TrackingUnavailable:  # lost during the run: what is logged waits on disk, training goes on
        mlflow_run = ""
    return {
        "data_digest": distilled.digest,
        "recipe": config.recipe,
        "code_version": STEP_VERSION,
        "mlflow_run": mlflow_run,
    }


def _commit(step: StepDir, outcome: TrainOutcome, counts: dict[str, int]) -> StepOutput:
    last = read_records(step.path / METRICS)[-1]
    told = {"counts": counts, "training": {**asdict(outcome), "last_record": last}}
    made = [name for name in (CHECKPOINT, METRICS, BACKBONE) if (step.path / name).exists()]
    return step.commit(told, outputs=made)


def trained_backbone(trained: StepOutput, base: str) -> str:
    """The model that the trained heads run on: the merged one of a joint training, else the base."""
    merged = trained.path / BACKBONE
    return str(merged) if merged.is_dir() else base


def _last_step(metrics: Path) -> int:
    """Of the last whole line, without reading the file from its start each time."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().split(b"\n")
    return int(json.loads(lines[-2])["step"]) if len(lines) > 2 else 0


@contextmanager
def _following(metrics: Path, advance: Advance) -> Iterator[None]:
    """Moves the bar by what the workers write to metrics.jsonl, wherever they run."""
    ended = threading.Event()

    def follow() -> None:
        shown, more = 0, True
        while more:
            more = not ended.wait(_POLL_S)
            done = _last_step(metrics)
            if done > shown:
                advance(done - shown)
                shown = done

    thread = threading.Thread(target=follow, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
