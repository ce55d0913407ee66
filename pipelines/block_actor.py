"""The actor of distillation: an engine in a Ray Data pool, called by several threads with a block each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.answering import Answerer, ReplyConfig
from pipelines.distilled import write_block
from pipelines.prompt_files import Prompt
from pipelines.prompts import SCHEMA as PROMPT_SCHEMA

if TYPE_CHECKING:
    from medusa import Engine

TASK_SCHEMA = pa.schema(
    [
        ("block", pa.int32()),
        ("file", pa.string()),
        ("prompts", pa.list_(pa.struct(list(PROMPT_SCHEMA)))),
    ]
)


class WorkerDiedError(RuntimeError):
    """A block has ended its worker again and again without an exception."""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What an actor tells of a block that it has put in place. `replies_stepped` / `steps` is its mean batch;
    `started` and `ended` are seconds of the system's clock."""

    block: int
    conversations: int
    failed: int
    first_failure: str
    rows: int
    tokens: int
    steps: int
    replies_stepped: int
    started: float
    ended: float


def block_task(block: int, file: Path, prompts: Sequence[Prompt]) -> pa.Table:
    """A block as one row of a Ray dataset."""
    row = {"block": block, "file": str(file), "prompts": [asdict(prompt) for prompt in prompts]}
    return pa.Table.from_pylist([row], schema=TASK_SCHEMA)


class BlockActor:
    """`work` is a folder for what is unfinished, on the file system of the blocks."""

    def __init__(self, build_engine: Callable[[], Engine], config: ReplyConfig, work: Path, max_attempts: int) -> None:
        self._work = work
        self._max_attempts = max_attempts
        self._answerer = Answerer(build_engine, config)

    def __call__(self, tasks: pa.Table) -> pa.Table:
        (task,) = tasks.to_pylist()
        prompts = [Prompt(**{**prompt, "turns": tuple(prompt["turns"])}) for prompt in task["prompts"]]
        return pa.Table.from_pylist([asdict(self._answer(task["block"], Path(task["file"]), prompts))])

    def close(self) -> None:
        """Ends the engine's processes, where it has others."""
        self._answerer.close()

    def _answer(self, block: int, file: Path, prompts: Sequence[Prompt]) -> BlockReport:
        self._count_attempt(block)
        started = time.time()
        conversations = self._answerer.answer(prompts)
        write_block(file, self._work, conversations)
        failed = [c for c in conversations if c.outcome == "failed"]
        steps, replies_stepped = self._answerer.take_counters()
        return BlockReport(
            block=block,
            conversations=len(conversations),
            failed=len(failed),
            first_failure=f"{failed[0].prompt.id}: {failed[0].reason}: {failed[0].detail}" if failed else "",
            rows=sum(len(c.turns) for c in conversations),
            tokens=sum(len(turn.completion_ids) for c in conversations for turn in c.turns),
            steps=steps,
            replies_stepped=replies_stepped,
            started=started,
            ended=time.time(),
        )

    def _count_attempt(self, block: int) -> None:
        """Ray starts a dead actor again without end; a block that always ends it must stop the run."""
        attempts = self._work / f"attempts-{block:05d}"
        with attempts.open("ab") as file:
            file.write(b".")
        if attempts.stat().st_size > self._max_attempts:
            raise WorkerDiedError(
                f"block {block} has ended its worker {self._max_attempts} times without an exception, most "
                "likely by running out of memory: lower distill.max_batch_size or distill.kv_cache_gb, or look "
                "at the worker's log"
            )
