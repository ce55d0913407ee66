"""Reading prompts: whatever a user has, as rows for pipelines/prompt_rows.py; a row that is none is kept aside.

    a file      .jsonl, .json (an array), .txt (a prompt a line), each also .gz; .parquet; .arrow
    a folder    of Hugging Face datasets (save_to_disk, or a snapshot of its repository), or of such files
    a pattern   such as "ultrachat/data/train_sft-*.parquet"

FILES holds a reader for each kind of file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from medusa.config import ConfigError
from medusa.digests import file_sha256
from pipelines.prompt_rows import EXAMPLE, Prompt, RowError, normalise

__all__ = [
    "Prompt",
    "PromptError",
    "Rejected",
    "RowError",
    "drop_duplicates",
    "file_digest",
    "normalise",
    "read_prompts",
    "sample_files",
]

_BATCH_ROWS = 1024
_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")


class PromptError(ConfigError):
    """The prompts cannot be used as they are; the message says which file and line, and what to do."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was kept aside. `line` counts from 1 in `file`; `row` is the source text."""

    line: int
    reason: str
    row: str
    file: str = ""


def read_prompts(path: Path) -> tuple[list[Prompt], list[Rejected]]:
    """Every row of a file, folder or pattern, and the rows that cannot be used; a source without rows is an error."""
    prompts: list[Prompt] = []
    rejected: list[Rejected] = []
    for file in source_files(path):
        for line, row in _rows(file):
            try:
                prompts.append(normalise(_parsed(row)))
            except RowError as error:
                rejected.append(Rejected(line, str(error), _printable(row), file.name))
    if not prompts and not rejected:
        raise PromptError(f"{path} is empty; it must hold at least one prompt, for example {EXAMPLE}")
    return prompts, rejected


def sample_files(folder: Path, days: int, today: date) -> list[Path]:
    """The files that the service wrote (deployments/sampling_log.py) on the last `days` days before `today`.

    Today's are left out: they still grow, and a run that is tried again later today must find the same prompts.
    """
    if not folder.is_dir():
        raise PromptError(f"{folder}: no such folder of sampled prompts; it is `path` of the service's sampling")
    wanted = [folder / f"day={(today - timedelta(days=back)).isoformat()}" for back in range(days, 0, -1)]
    return [file for day in wanted for file in sorted(day.glob("[!.]*.parquet"))]


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
    """sha256 of a prompt file's bytes; of several files, over their names and digests."""
    files = source_files(path)
    if files == [path]:
        return f"sha256:{file_sha256(path)}"
    lines = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def source_files(path: Path) -> list[Path]:
    """The files behind a path of the config, in the order in which they are read."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if any(mark in str(path) for mark in "*?["):
        found = sorted(file for file in _root_of(path).glob(_pattern_of(path)) if file.is_file())
        if found:
            return found
        raise PromptError(f"{path}: no file has such a name (looked in {Path.cwd()})")
    raise PromptError(f"{path}: no such prompt file (looked in {Path.cwd()})")


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if len(splits) > 1:
            raise PromptError(f"{folder} holds the splits {splits}; give one of them, such as {folder / splits[0]}")
        return _folder_files(folder / splits[0])
    if (folder / "state.json").is_file():
        return [folder / file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]]
    for suffix in (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".txt"):
        files = sorted(file for file in folder.rglob(f"*{suffix}") if not file.name.startswith("."))
        if files:
            return _of_one_split(folder, files)
    raise PromptError(f"{folder} holds no dataset and no file ending in .parquet, .arrow, .jsonl or .txt")


def _of_one_split(folder: Path, files: list[Path]) -> list[Path]:
    splits = sorted({match[1] for file in files if (match := _SPLIT_FILE.fullmatch(file.name))})
    if len(splits) > 1:
        pattern = files[0].parent / f"{splits[-1]}-*.parquet"
        raise PromptError(f"{folder} holds files of the splits {splits}; choose by a pattern, such as {pattern}")
    return files


def _root_of(pattern: Path) -> Path:
    return Path(pattern.anchor) if pattern.is_absolute() else Path()


def _pattern_of(pattern: Path) -> str:
    return str(pattern.relative_to(pattern.anchor)) if pattern.is_absolute() else str(pattern)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1; the text, the bytes where they are no UTF-8, or the object) of every row."""
    read = FILES.get(Path(path.name.removesuffix(".gz")).suffix)
    if read is None:
        raise PromptError(f"{path}: expected a file ending in one of {', '.join(FILES)} (text also .gz), or a folder")
    try:
        yield from read(path)
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise PromptError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str | bytes]]:
    """The lines that are not blank, without their line end and the file's byte order mark."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")
            if line.strip():
                yield number, _decoded(line)


def _plain_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        yield number, {"prompt": line} if isinstance(line, str) else line


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        rows = json.loads(raw)
    except ValueError as error:
        raise PromptError(f"{path} is not JSON: {error}; a file of one object a line is named .jsonl") from error
    if not isinstance(rows, list):
        raise PromptError(f"{path} must hold a JSON array of rows, got {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as file:
        yield from _numbered(file.iter_batches(_BATCH_ROWS))


def _arrow(path: Path) -> Iterator[tuple[int, Any]]:
    """The stream format that Hugging Face datasets are saved in."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        yield from _numbered(stream)


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, Any]]:
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


FILES: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _lines,
    ".json": _json_array,
    ".txt": _plain_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


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
