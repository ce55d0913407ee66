"""The replies that everything is trained and measured on: one JSON object a line in WORK/replies.jsonl, only added to.

set            train, heldout_chat, mt_bench; with "_reference" the data's own replies
temperature    that it was drawn at; null for references
number, round  which prompt of the set, and which reply to it
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa import Engine, SamplingParams
from medusa.loops import cut_at_loop
from medusa.training.batch import Row

Reply = dict[str, Any]
LONGEST_REFERENCE = 1024


@dataclass(frozen=True)
class Asked:
    """One reply that is wanted."""

    set: str
    temperature: float
    number: int
    round: int
    prompt_ids: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.set, self.temperature, self.number, self.round


def key_of(reply: Reply) -> tuple[Any, ...]:
    return reply["set"], reply["temperature"], reply["number"], reply["round"]


def read_replies(work: Path) -> list[Reply]:
    """Those written so far; a last line that a kill tore is not one."""
    path = work / "replies.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def add_replies(work: Path, replies: Iterable[Reply]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "replies.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")))
    with path.open("a") as file:
        file.writelines(json.dumps(reply) + "\n" for reply in replies)


def read_prompts(path: Path) -> Iterator[tuple[str, str | None]]:
    """First user turns, with the reference reply where the set has one."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            row = json.loads(line)
            if "messages" in row:
                texts = [m["content"] for m in row["messages"] if m["role"] in ("user", "assistant")]
                yield texts[0], texts[1] if len(texts) > 1 else None
            else:
                yield (row["turns"][0] if "turns" in row else row["prompt"]), None


def answer(engine: Engine, asked: Sequence[Asked], max_tokens: int) -> list[Reply]:
    """Plain decoding of everything asked; replies cut where they loop."""
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=a.temperature, seed=1_000_003 * a.round + a.number)
        for a in asked
    ]
    done = engine.generate([a.prompt_ids for a in asked], params)
    return [
        {
            "set": a.set,
            "temperature": a.temperature,
            "number": a.number,
            "round": a.round,
            "prompt_ids": list(a.prompt_ids),
            "reply_ids": completion.token_ids[: cut_at_loop(completion.token_ids)],
        }
        for a, completion in zip(asked, done, strict=True)
    ]


def to_pair(reply: Reply) -> tuple[list[int], list[int]]:
    return reply["prompt_ids"], reply["reply_ids"]


def to_row(reply: Reply) -> Row:
    return Row.of(*to_pair(reply))
