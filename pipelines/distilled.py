"""The distilled table: parquet files of one block of conversations each, and the account of every
conversation.

    id string, turn int32, prompt_ids list<int32>, completion_ids list<int32>, finish_reason string

Token ids, never text. A file's metadata tells, for each conversation that ended before its last turn, why; so
one rename commits a block's rows and its account together.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.answering import Conversation
from pipelines.prompt_files import Prompt

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("turn", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)
ENDINGS = b"medusa.endings"  # metadata key: [{"id", "outcome", "reason", "detail"}, ...]


class DistilledTableError(RuntimeError):
    """The table is not what the prompts ask for; the message names the file and the remedy."""


@dataclass
class Account:
    """What became of the conversations, input = written + skipped + failed, and their rows.

    `failures` and `incomplete` (skipped, or written without their last turns) name each conversation and its reason.
    """

    input: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    incomplete: list[dict[str, str]] = field(default_factory=list)
    rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)

    def manifest(self) -> dict[str, Any]:
        counts = {name: self.outcomes[name] for name in ("written", "skipped", "failed")}
        return {
            "counts": {"input": self.input, **counts},
            "reasons": {name: dict(counter) for name, counter in sorted(self.reasons.items())},
            "table": {
                "rows": self.rows,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "finish_reasons": dict(self.finish_reasons),
            },
        }


def block_path(data: Path, block: int) -> Path:
    return data / f"block-{block:05d}.parquet"


def write_block(path: Path, work: Path, conversations: Sequence[Conversation]) -> None:
    """Puts the block in place, atomically; `work` is a folder of the same file system for the unfinished
    file.

    A block that is already there stays: its writer was faster, and what was committed does not change.
    """
    endings = [
        {"id": c.prompt.id, "outcome": c.outcome, "reason": c.reason, "detail": c.detail}
        for c in conversations
        if c.reason is not None
    ]
    schema = SCHEMA.with_metadata({ENDINGS: json.dumps(endings)})
    partial = work / f"{path.name}.{uuid.uuid4().hex[:8]}.partial"
    pq.write_table(pa.Table.from_pylist(list(_rows(conversations)), schema=schema), partial)
    if path.exists():
        partial.unlink()
    else:
        os.replace(partial, path)


def read_endings(path: Path) -> list[dict[str, str]]:
    """The conversations of a block that ended early, from its metadata alone."""
    metadata = pq.read_schema(path).metadata or {}
    if ENDINGS not in metadata:
        raise DistilledTableError(f"{path} was not written by the distil step; remove it and run again")
    return json.loads(metadata[ENDINGS])


def account_for(data: Path, blocks: Sequence[Sequence[Prompt]]) -> Account:
    """Reads the whole table and counts it; DistilledTableError unless every prompt is there exactly once."""
    account = Account()
    for block, prompts in enumerate(blocks):
        path = block_path(data, block)
        table = pq.read_table(path)
        endings = read_endings(path)
        _check_block(path, table, endings, prompts)
        _add(account, table, endings, len(prompts))
    return account


def _rows(conversations: Sequence[Conversation]) -> Iterator[dict[str, Any]]:
    for conversation in conversations:
        for number, turn in enumerate(conversation.turns):
            yield {
                "id": conversation.prompt.id,
                "turn": number,
                "prompt_ids": turn.prompt_ids,
                "completion_ids": turn.completion_ids,
                "finish_reason": turn.finish_reason,
            }


def _check_block(path: Path, table: pa.Table, endings: Sequence[dict[str, str]], prompts: Sequence[Prompt]) -> None:
    remedy = "remove it and run again to answer its prompts anew"
    if not table.schema.equals(SCHEMA):
        raise DistilledTableError(f"{path} has columns {table.schema.names}, not {SCHEMA.names}; {remedy}")
    keys = list(zip(table["id"].to_pylist(), table["turn"].to_pylist(), strict=True))
    turns = Counter(identity for identity, _ in keys)
    if sorted(keys) != sorted((identity, turn) for identity, count in turns.items() for turn in range(count)):
        raise DistilledTableError(f"{path} holds a turn twice or lacks one between two others; {remedy}")
    left_out = [ending["id"] for ending in endings if ending["outcome"] != "written"]
    if sorted([*turns, *left_out]) != sorted(prompt.id for prompt in prompts):
        raise DistilledTableError(
            f"{path} accounts for {len(turns)} + {len(left_out)} conversations, which are not the "
            f"{len(prompts)} prompts of its block; {remedy}"
        )
    for column in ("prompt_ids", "completion_ids"):
        if any(not ids for ids in table[column].to_pylist()):
            raise DistilledTableError(f"{path} has a row without {column}; {remedy}")


def _add(account: Account, table: pa.Table, endings: Sequence[dict[str, str]], num_prompts: int) -> None:
    account.input += num_prompts
    account.outcomes["written"] += len(set(table["id"].to_pylist()))
    for ending in endings:
        kind = "ended_early" if ending["outcome"] == "written" else ending["outcome"]
        account.reasons.setdefault(kind, Counter())[ending["reason"]] += 1
        if ending["outcome"] != "written":
            account.outcomes[ending["outcome"]] += 1
        if ending["outcome"] == "failed":
            account.failures.append({key: ending[key] for key in ("id", "reason", "detail")})
        else:
            account.incomplete.append({**ending, "outcome": kind})
    account.rows += table.num_rows
    account.prompt_tokens += len(table["prompt_ids"].combine_chunks().flatten())
    account.completion_tokens += len(table["completion_ids"].combine_chunks().flatten())
    account.finish_reasons.update(table["finish_reason"].to_pylist())
