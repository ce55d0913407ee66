"""The prompts step: read, drop duplicates, select, and write the one table that distillation and evaluation
read.

<step dir>/prompts.parquet    a row a conversation: id, turns (the user's, in order), system, category
<step dir>/rejected.jsonl     the rows that could not be used, each with its file, line number and the reason

The manifest counts input = written + rejected + duplicates + other_part + excluded + beyond_limit; `sampled` of those
that were written are what users asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from medusa.config import strict
from pipelines.artifact import StepOutput, open_step
from pipelines.demo_prompts import DEMO_PROMPTS_VERSION, demo_rows
from pipelines.prompt_files import (
    Prompt,
    PromptError,
    Rejected,
    drop_duplicates,
    file_digest,
    normalise,
    read_prompts,
    sample_files,
)

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 1
TABLE = "prompts.parquet"
SAMPLED = "sampled"  # the category of what users asked
REJECTED = "rejected.jsonl"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("turns", pa.list_(pa.string())),
        ("system", pa.string()),
        ("category", pa.string()),
    ]
)


@strict
@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """What users asked on the last `days` days before today (UTC), as the service sampled it; the newest `limit`."""

    path: str
    days: int = 7
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.days < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"days and limit must be at least 1, got {self.days} and {self.limit}")


@strict
@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from (`path`, a file, folder or pattern, or `generator`; and `samples`) and which are taken.

    `heldout_fraction` of the rows, by a hash of their id alone, are the part "heldout", the others "train":
    two configs that differ in `part` share no id, whatever their seed and limit. Rows whose first turn stands
    in the prompt file `exclude` are left out. `limit` rows are then taken in an order drawn from `seed`; a
    smaller limit is a prefix of a larger one. `samples` come on top, with a limit of their own; the parts hold for them
    too.
    """

    path: str | None = None
    generator: Literal["python-docs"] | None = None
    samples: SamplesConfig | None = None
    part: Literal["all", "train", "heldout"] = "all"
    heldout_fraction: float = 0.0
    exclude: str | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.generator is None):
            raise ValueError(f"give either path or generator, got path={self.path}, generator={self.generator}")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must be at least 0 and below 1, got {self.heldout_fraction}")
        if self.part != "all" and self.heldout_fraction == 0:
            raise ValueError(f"part={self.part!r} needs heldout_fraction > 0, for example 0.05")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for every prompt, got {self.limit}")


def prepare_prompts(context: RunContext, config: PromptsConfig) -> StepOutput:
    """Runs the step, or answers with what an earlier run of it wrote."""
    samples = _sample_files(config)
    with (
        open_step(context.root, "prompts", STEP_VERSION, config, _input_digests(config, samples)) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        rows, rejected = _read_source(config)
        sampled = _read_samples(samples)
        prompts, duplicates = drop_duplicates([*rows, *sampled])
        chosen, left_out = select(prompts, config)
        counts = {"input": len(rows) + len(sampled) + len(rejected), "written": len(chosen), "rejected": len(rejected)}
        counts |= {"duplicates": duplicates, **left_out}
        if config.samples is not None:
            counts["sampled"] = sum(prompt.category == SAMPLED for prompt in chosen)
        if not chosen:
            raise PromptError(_nothing_left(config, counts, rejected))
        write_prompts(step.path / TABLE, chosen)
        _write_rejected(step.path / REJECTED, rejected)
        log.log_metrics(counts)
        return step.commit({"counts": counts}, outputs=[TABLE, REJECTED])


def select(prompts: Sequence[Prompt], config: PromptsConfig) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that the config asks for, in its seeded order, and how many were left out and why."""
    part = [prompt for prompt in prompts if config.part in ("all", part_of(prompt.id, config.heldout_fraction))]
    known = _first_turns(config.exclude)
    fresh = [prompt for prompt in part if prompt.turns[0].strip() not in known]
    order = sorted(fresh, key=lambda prompt: _digest(f"order {config.seed} {prompt.id}"))
    chosen = [prompt for prompt in order if prompt.category != SAMPLED][: config.limit]
    newest_first = [prompt for prompt in reversed(fresh) if prompt.category == SAMPLED]
    chosen += newest_first[: config.samples.limit if config.samples else None]
    left_out = {
        "other_part": len(prompts) - len(part),
        "excluded": len(part) - len(fresh),
        "beyond_limit": len(fresh) - len(chosen),
    }
    return chosen, left_out


def part_of(prompt_id: str, heldout_fraction: float) -> Literal["train", "heldout"]:
    """Which side of the split an id falls on."""
    position = int.from_bytes(_digest(f"part {prompt_id}")[:8], "big") / 2**64
    return "heldout" if position < heldout_fraction else "train"


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """The prompt table, atomically."""
    table = pa.Table.from_pylist([asdict(prompt) for prompt in prompts], schema=SCHEMA)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def load_prompts(source: StepOutput | Path) -> list[Prompt]:
    """The prompts of a finished prompts step, of a prompt table, or of any prompt file without a bad row."""
    path = source.path / TABLE if isinstance(source, StepOutput) else Path(source)
    prompts, rejected = read_prompts(path)
    if rejected:
        bad = rejected[0]
        raise PromptError(f"{path}, row {bad.line}: {bad.reason}; the prompts step keeps such rows aside")
    return drop_duplicates(prompts)[0]


def _read_source(config: PromptsConfig) -> tuple[list[Prompt], list[Rejected]]:
    if config.path is not None:
        return read_prompts(Path(config.path))
    return [normalise(row) for row in demo_rows()], []


def _sample_files(config: PromptsConfig) -> list[Path]:
    if config.samples is None:
        return []
    return sample_files(Path(config.samples.path), config.samples.days, datetime.now(UTC).date())


def _read_samples(files: Sequence[Path]) -> list[Prompt]:
    """Each content once, in order of the days; the writers make no row that cannot be used."""
    found = [replace(prompt, category=SAMPLED) for file in files for prompt in read_prompts(file)[0]]
    return list({prompt.id: prompt for prompt in found}.values())


def _input_digests(config: PromptsConfig, samples: Sequence[Path] = ()) -> dict[str, str]:
    """What the table depends on besides the config: its files' bytes, or the Python it asks about."""
    digests = {name: file_digest(Path(path)) for name in ("path", "exclude") if (path := getattr(config, name))}
    if config.generator is not None:
        digests["generator"] = f"{config.generator} {DEMO_PROMPTS_VERSION} on Python {platform.python_version()}"
    if config.samples is not None:
        digests["samples"] = hashlib.sha256("".join(file_digest(file) for file in samples).encode()).hexdigest()
    return digests


def _first_turns(path: str | None) -> set[str]:
    return set() if path is None else {prompt.turns[0].strip() for prompt in read_prompts(Path(path))[0]}


def _write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rejected))
    os.replace(partial, path)


def _nothing_left(config: PromptsConfig, counts: dict[str, int], rejected: Sequence[Rejected]) -> str:
    first = f"; line {rejected[0].line} was rejected: {rejected[0].reason}" if rejected else ""
    return f"{config.path or config.generator}: no prompt is left to use of {counts}{first}"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
