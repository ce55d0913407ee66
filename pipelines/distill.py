"""The distil step: the model answers the prompts itself, and its own tokens become the training table.

    <step dir>/data/block-00000.parquet ...   the distilled table (pipelines/distilled.py)
    <step dir>/failed.jsonl                   conversations without one usable turn, each with the reason
    <step dir>/incomplete.jsonl               those that were skipped or ended before their last turn, likewise

Exactly once. The prompt table is cut into blocks of `rows_per_block` conversations, and block i is the file
of number i: an actor answers a block whole, all turns of its conversations, and moves the finished file into
place. So a block is there entirely or not at all, a conversation can stand in no file but its block's, and a
restart answers the blocks whose file is missing. Whoever answers a block twice (an actor that Ray started
again, a dead driver's last worker) still leaves one file. Ray Data's own checkpoint (beta in 2.60) keeps a
list of written ids beside the data instead; a late writer that a new run did not wait for can add rows behind
that list's back, and filtering by it takes one more CPU.

Full batches. An actor takes several blocks at a time (as threads, see pipelines/answering.py), so that its
engine's batch is filled from the next block while the last replies of the one before end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medusa import Engine
from medusa.checkpoint import CheckpointMismatchError, read_meta
from medusa.tokenizer import ChatTokenizer
from medusa.weights import model_directory, weights_digest
from pipelines.artifact import StepDir, StepOutput, open_step
from pipelines.block_actor import BlockActor, BlockReport, block_task
from pipelines.distill_config import DistillConfig
from pipelines.distilled import account_for, block_path, read_endings
from pipelines.progress import LOG_EVERY_S
from pipelines.prompt_files import Prompt, file_digest
from pipelines.prompts import load_prompts

if TYPE_CHECKING:
    from pipelines.run import ModelConfig, RunContext

STEP_VERSION = 1
DATA = "data"
FAILED = "failed.jsonl"
INCOMPLETE = "incomplete.jsonl"
CHAMPION = "champion"
WORK = ".work"  # unfinished files and attempts; hidden, so that it is no output of the step


class DistillError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def distill(
    context: RunContext,
    config: DistillConfig,
    prompts: StepOutput | Path,
    *,
    build_engine: Callable[[], Engine] | None = None,
) -> StepOutput:
    """Runs the step, or what is left of it, on the Ray that is initialised, unless `num_actors` is 0.
    `build_engine` makes an actor's engine; by default it is the model of the context.
    """
    conversations = load_prompts(prompts)
    size = config.rows_per_block
    blocks = [conversations[start : start + size] for start in range(0, len(conversations), size)]
    inputs = {"prompts": _digest(prompts), **_model_digests(context.model)}
    _check_heads(config.heads, inputs["backbone"], context.model.backbone)
    with (
        open_step(context.root, "distill", STEP_VERSION, config.meaning, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        run = Run(step, config, blocks, build_engine or engine_builder(context.model, config), context.console)
        stepping = run.answer_missing()
        account = account_for(step.path / DATA, blocks)
        _write_lines(step.path / FAILED, account.failures)
        _write_lines(step.path / INCOMPLETE, account.incomplete)
        manifest = account.manifest()
        log.log_metrics({**manifest["counts"], "rows": account.rows, "completion_tokens": account.completion_tokens})
        return step.commit({**manifest, "stepping": stepping}, outputs=[DATA, FAILED, INCOMPLETE])


class Run:
    """The work that a step's folder still lacks."""

    def __init__(
        self,
        step: StepDir,
        config: DistillConfig,
        blocks: Sequence[Sequence[Prompt]],
        build_engine: Callable[[], Engine],
        console: Console,
    ) -> None:
        self._step = step
        self._path = step.path
        self._config = config
        self._build_engine = build_engine
        self._console = console
        self._files = {block_path(step.path / DATA, number): block for number, block in enumerate(blocks)}
        self._total = sum(map(len, blocks))

    def answer_missing(self) -> dict[str, float]:
        """Answers the blocks whose file is missing. Returns this run's engine steps, the replies under way summed over
        them (their ratio is the mean batch), the reply tokens they gave, and the seconds from the first block's start
        to the last one's end.
        """
        shutil.rmtree(self._path / WORK, ignore_errors=True)
        for folder in (self._path / DATA, self._path / WORK):
            folder.mkdir(exist_ok=True)
        done = [file for file in self._files if file.exists()]
        failed = sum(ending["outcome"] == "failed" for file in done for ending in read_endings(file))
        stepping: dict[str, float] = {"steps": 0, "replies_stepped": 0, "tokens": 0, "seconds": 0.0}
        first_start, last_end = math.inf, 0.0
        with _progress(self._console, self._total, sum(len(self._files[file]) for file in done)) as advance:
            for report in self._reports([file for file in self._files if file not in set(done)]):
                self._step.ensure_held()  # else the rest would be answered for nothing
                failed += report.failed
                self._check_failures(failed, report)
                stepping["steps"] += report.steps
                stepping["replies_stepped"] += report.replies_stepped
                stepping["tokens"] += report.tokens
                first_start, last_end = min(first_start, report.started), max(last_end, report.ended)
                stepping["seconds"] = last_end - first_start
                advance(report)
        return stepping

    def _reports(self, missing: Sequence[Path]) -> Iterator[BlockReport]:
        """Answers the blocks, in the order in which they come to be done."""
        numbers = {file: number for number, file in enumerate(self._files)}
        tasks = [block_task(numbers[file], file, self._files[file]) for file in missing]
        if not tasks:
            return
        rows = self._rows_here(tasks) if self._config.num_actors == 0 else self._rows_on_ray(tasks)
        for row in rows:
            yield BlockReport(**row)

    def _rows_here(self, tasks: Sequence[pa.Table]) -> Iterator[dict[str, Any]]:
        """One actor as a plain object, called by as many threads as Ray Data would use."""
        actor = BlockActor(self._build_engine, self._config, self._path / WORK, self._config.max_attempts)
        with (
            closing(actor),
            ThreadPoolExecutor(self._config.blocks_in_flight, thread_name_prefix="block") as pool,
        ):
            for done in as_completed([pool.submit(actor, task) for task in tasks]):
                yield from done.result().to_pylist()

    def _rows_on_ray(self, tasks: Sequence[pa.Table]) -> Iterator[dict[str, Any]]:
        config = self._config
        num_actors, gpus_per_actor = _placement(config)
        if not _fits_a_node(config.cpus_per_actor, gpus_per_actor):
            self._console.print(
                f"distil: no node has {config.cpus_per_actor} CPUs and {gpus_per_actor} GPUs for an actor; waiting "
                "for the cluster to grow (or lower distill.cpus_per_actor and distill.gpus_per_actor)"
            )
        dataset = ray.data.from_arrow(tasks).map_batches(
            BlockActor,
            batch_size=1,  # a row is a block
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(num_actors, len(tasks)),
                max_concurrent_calls_per_actor=config.blocks_in_flight,
                max_tasks_in_flight_per_actor=config.blocks_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=config.cpus_per_actor,
            num_gpus=gpus_per_actor,
            fn_constructor_kwargs={
                "build_engine": self._build_engine,
                "config": config,
                "work": self._path / WORK,
                "max_attempts": config.max_attempts,
            },
        )
        dataset.context.enable_progress_bars = False
        yield from dataset.iter_rows()

    def _check_failures(self, failed: int, report: BlockReport) -> None:
        if failed > self._config.max_failed * self._total:
            raise DistillError(
                f"{failed} of {self._total} conversations failed, more than "
                f"distill.max_failed={self._config.max_failed}; the last is {report.first_failure}. "
                f"Mend the cause and remove {self._path} to answer them again"
            )


@contextmanager
def _progress(console: Console, total: int, done: int) -> Iterator[Callable[[BlockReport], None]]:
    """A bar over the conversations, with rows and tokens a second of this run; yields what moves it."""
    columns = (TextColumn("distil"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    on_terminal = console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not on_terminal) as bar:
        task = bar.add_task("distil", total=total, completed=done, rates="starting")
        started = printed = time.monotonic()
        rows = tokens = 0

        def advance(report: BlockReport) -> None:
            nonlocal rows, tokens, printed
            rows, tokens = rows + report.rows, tokens + report.tokens
            seconds = time.monotonic() - started
            rates = f"{rows / seconds:,.1f} rows/s {tokens / seconds:,.0f} tokens/s"
            bar.update(task, advance=report.conversations, rates=rates)
            completed = int(bar.tasks[0].completed)
            if not on_terminal and (completed == total or time.monotonic() - printed > LOG_EVERY_S):
                printed = time.monotonic()
                console.print(f"distil: {completed}/{total} {rates}", highlight=False)

        yield advance


def _placement(config: DistillConfig) -> tuple[int, float]:
    """How many actors, and the GPUs of each, where the config leaves it to the cluster."""
    gpus = ray.cluster_resources().get("GPU", 0.0)
    each = config.gpus_per_actor if config.gpus_per_actor is not None else min(1.0, gpus) * config.tensor_parallel
    return config.num_actors or max(1, int(gpus / each) if each else 1), each


def _fits_a_node(cpus: float, gpus: float) -> bool:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes)


def engine_builder(model: ModelConfig, config: DistillConfig) -> Callable[[], Engine]:
    """What makes an actor's engine, in whatever process it is called."""
    return partial(
        Engine.from_pretrained,
        model.backbone,
        None if config.heads is None else str(Path(config.heads).resolve()),  # workers have another folder
        device=model.device,
        dtype=None if model.dtype is None else getattr(torch, model.dtype),
        max_batch_size=config.max_batch_size,
        max_model_len=config.max_model_len,
        kv_cache_gb=config.kv_cache_gb,
        quantization=config.quantization,
        tensor_parallel=config.tensor_parallel,
        speculation=config.speculation,
    )


def _check_heads(heads: str | None, backbone_digest: str, backbone: str) -> None:
    """Before any actor starts: each of them would only say the same."""
    if heads is None:
        return
    reference = read_meta(Path(heads)).backbone
    if reference.weights_digest != backbone_digest:
        raise CheckpointMismatchError(
            f"distill.heads={heads} belongs to {reference.name} ({reference.weights_digest}), but the backbone is "
            f"{backbone} ({backbone_digest}); give heads of this backbone, or null"
        )


def _model_digests(model: ModelConfig) -> dict[str, str]:
    directory = model_directory(model.backbone)
    tokenizer = ChatTokenizer.from_pretrained(directory)
    return {"backbone": weights_digest(directory), "tokenizer": tokenizer.digest, "dtype": str(model.dtype)}


def _digest(prompts: StepOutput | Path) -> str:
    return prompts.digest if isinstance(prompts, StepOutput) else file_digest(Path(prompts))


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(unfinished, path)
