"""Reading prompts: whatever a user has, normalised to conversations of the user's turns.

Read are JSON lines (also .gz), a JSON array, plain text (a prompt a line) and parquet, with rows of any of
these shapes, each with or without "id", "system" and "category":

    {"messages": [{"role": "user", "content": "..."}, ...]}           OpenAI's
    {"conversations": [{"from": "human", "value": "..."}, ...]}       ShareGPT's
    {"turns": ["...", "..."]}                                         MT-bench's
    {"prompt": "..."}

Replies in the source are left out: the model answers each turn itself. A row without an id gets a hash of its
content.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medusa.config import ConfigError

ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
_EXAMPLE = '{"messages": [{"role": "user", "content": "Hello"}]}'


class PromptError(ConfigError):
    """The prompts cannot be used as they are; the message says which file and line, and what to do."""


class RowError(ValueError):
    """This row alone cannot be used; the message is the reason it is kept aside with."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be answered: the user's turns in order."""

    id: str
    turns: tuple[str, ...]
    system: str | None = None
    category: str | None = None

    @property
    def content_hash(self) -> str:
        """Of what the model is asked: the same for equal questions, whatever their id and category."""
        content = json.dumps([self.system, self.turns], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was kept aside. `row` is the source text."""

    line: int
    reason: str
    row: str


def read_prompts(path: Path) -> tuple[list[Prompt], list[Rejected]]:
    """Every row of a prompt file, and the rows that cannot be used; a file without rows is an error."""
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file (looked in {Path.cwd()})")
    prompts: list[Prompt] = []
    rejected: list[Rejected] = []
    for line, row in _source_rows(path):
        try:
            prompts.append(normalise(_parsed(row)))
        except RowError as error:
            rejected.append(Rejected(line, str(error), _printable(row)))
    if not prompts and not rejected:
        raise PromptError(f"{path} is empty; it must hold at least one prompt, for example {_EXAMPLE}")
    return prompts, rejected


def normalise(row: Any) -> Prompt:
    """One row of any known shape as a Prompt; RowError tells why it is none."""
    if not isinstance(row, dict):
        raise RowError(f"a row is an object such as {_EXAMPLE}, got {type(row).__name__}")
    system, turns = _turns(row)
    if not turns:
        raise RowError("no user turn; at least one message with role user is needed")
    for number, turn in enumerate(turns, start=1):
        if not turn.strip():
            raise RowError(f"user turn {number} is empty")
    category = row.get("category", row.get("source"))
    prompt = Prompt(_identity(row.get("id")), tuple(turns), system, None if category is None else str(category))
    for text in (prompt.id, *prompt.turns, system or "", prompt.category or ""):
        if not _encodable(text):
            raise RowError("the text holds half of a surrogate pair, which no tokenizer can read")
    return prompt if prompt.id else replace(prompt, id=prompt.content_hash)


def drop_duplicates(prompts: Iterable[Prompt]) -> tuple[list[Prompt], int]:
    """The first of each id, and how many equal ones were dropped; one id with two contents is an error."""
    first: dict[str, Prompt] = {}
    dropped = 0
    for prompt in prompts:
        known = first.setdefault(prompt.id, prompt)
        if known.content_hash != prompt.content_hash:
            raise PromptError(
                f"the id {prompt.id!r} stands for two different prompts, {known.turns[0][:60]!r} and "
                f"{prompt.turns[0][:60]!r}; make the ids unique, or leave them out for a hash of the content"
            )
        dropped += known is not prompt
    return list(first.values()), dropped


def file_digest(path: Path) -> str:
    """sha256 of a prompt file's bytes."""
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file (looked in {Path.cwd()})")
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _turns(row: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The system message and the user's turns of a row."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"system must be text, got {type(system).__name__}")
    if row.get("turns") is not None:
        return system, [_text(turn) for turn in _list(row["turns"], "turns")]
    if row.get("prompt") is not None:
        return system, [_text(row["prompt"])]
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _messages(system, _list(row[key], key))
    raise RowError(f"none of messages, conversations, turns, prompt is there; the keys are {sorted(map(str, row))}")


def _messages(system: str | None, messages: list[Any]) -> tuple[str | None, list[str]]:
    turns: list[str] = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"message {position + 1} is {type(message).__name__}, not an object with role and content")
        role = message.get("role", message.get("from"))
        role = ROLES.get(role, role) if isinstance(role, str) else role
        content = message.get("content", message.get("value"))
        if role == "user":
            turns.append(_text(content))
        elif role == "system" and position == 0 and system is None:
            system = _text(content)
        elif role != "assistant":
            raise RowError(f"message {position + 1} has role {role!r}; allowed are system (first), user, assistant")
    return system, turns


def _text(content: Any) -> str:
    """The text of a message: a string, or OpenAI's list of text parts."""
    if isinstance(content, list) and content:
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not isinstance(content, str):
        raise RowError(f"content must be text, got {type(content).__name__}")
    return content


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{name} must be a list, got {type(value).__name__}")
    return value


def _identity(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"id must be text or an integer, got {value!r}")
    return str(value)


def _source_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1; the text, the bytes where they are no UTF-8, or the object) of every row."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from enumerate(pq.read_table(path).to_pylist(), start=1)
        elif name.endswith(".json"):
            yield from enumerate(_json_array(path), start=1)
        elif name.endswith(".jsonl"):
            yield from _lines(path)
        elif name.endswith(".txt"):
            for number, line in _lines(path):
                yield number, {"prompt": line} if isinstance(line, str) else line
        else:
            raise PromptError(f"{path}: expected a file ending in .jsonl, .json or .txt (each also .gz), or .parquet")
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise PromptError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str | bytes]]:
    """The lines that are not blank, without their line end and the file's byte order mark."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")
            if line.strip():
                yield number, _decoded(line)


def _json_array(path: Path) -> list[Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        rows = json.loads(raw)
    except ValueError as error:
        raise PromptError(f"{path} is not JSON: {error}; a file of one object a line is named .jsonl") from error
    if not isinstance(rows, list):
        raise PromptError(f"{path} must hold a JSON array of rows, got {type(rows).__name__}")
    return rows


def _parsed(row: Any) -> Any:
    if isinstance(row, bytes):
        raise RowError("the line is not UTF-8")
    if not isinstance(row, str):
        return row
    try:
        return json.loads(row)
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from error
    except RecursionError:
        raise RowError("nested too deeply to be a prompt") from None


def _printable(row: Any) -> str:
    if isinstance(row, bytes):
        return row.decode("utf-8", "backslashreplace")
    return row if isinstance(row, str) else json.dumps(row, default=str)


def _decoded(line: bytes) -> str | bytes:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
