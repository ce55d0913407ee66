"""The report of `medusa bench start`: start.json and start.md."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write_atomically
from benchmarks.starting import Plan, Start
from deployments.config import ServerConfig
from medusa.weights import model_directory

COLUMNS = {
    "total": "total_s",
    "imports": "imports_s",
    "weights": "weights_s",
    "tokenizer, heads": "heads_s",
    "engine": "engine_s",
    "other loading": "other_loading_s",
    "listening": "listening_s",
    "first request": "request_s",
    "digest, beside": "digest_s",
    "waited for it": "waited_for_digest_s",
}


def write_report(directory: Path, config: ServerConfig, plan: Plan, starts: Sequence[Start]) -> Path:
    """start.json and start.md in `directory`, marked as partial while starts are missing; returns the latter."""
    planned = 2 * plan.repeats
    content = {
        "settings": _settings(config, plan),
        "partial": None if len(starts) == planned else f"{len(starts)} of {planned} starts",
        "medians": {state: _medians(starts, state) for state in ("empty", "warm")},
        "starts": [asdict(start) for start in starts],
    }
    write_atomically(directory / "start.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    report = directory / "start.md"
    write_atomically(report, lambda path: path.write_text(_markdown(content, starts)))
    return report


def _settings(config: ServerConfig, plan: Plan) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and not (config.device or "").startswith("cpu")
    files = list(model_directory(config.model).glob("*.safetensors"))
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "model": config.served_name,
        "weights, GB": round(sum(file.stat().st_size for file in files) / 1e9, 3),
        "heads": config.heads,
        "speculation": config.speculation if config.heads else "plain decoding, no heads",
        "max_batch_size": config.max_batch_size,
        "dtype": config.dtype or "the engine's own choice",
        "request": f"{plan.prompt_tokens} prompt tokens, {plan.reply_tokens} reply tokens",
        "compiles": "Triton's kernels" if on_gpu else "nothing: the kernels are a GPU's",
        "files": _state_of_files(plan),
    }


def _state_of_files(plan: Plan) -> str:
    """What can be said of the page cache."""
    if plan.read_first:
        return (
            "model and heads were read just before each start (read_s of start.json tells how long that took), so they "
            "came from the page cache as far as main memory holds them; a start from a cold disk was not measured"
        )
    return (
        "model and heads were not read before the first start, and whether the page cache had them is not known; the "
        "other starts follow one that has read them"
    )


def _medians(starts: Sequence[Start], state: str) -> dict[str, float] | None:
    of_state = [asdict(start) for start in starts if start.compile_cache == state]
    if not of_state:
        return None
    return {name: statistics.median(start[name] for start in of_state) for name in COLUMNS.values()}


def _markdown(content: dict[str, Any], starts: Sequence[Start]) -> str:
    settings = content["settings"]
    lines = [f"# The start of a replica: {settings['model']} on {settings['machine']}", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [f"- **partial**: {content['partial']}"] if content["partial"] else []
    lines += [
        "",
        "Seconds from the process's start to its first answer, and the parts one after another. The weights' digest",
        "was computed beside them; what was waited for it is in the parts. Engine: the cache of keys and values, and",
        "where the policy chooses, its measurements, for which the graphs are captured. Caches other than that of",
        "compiled kernels (Python's byte code, the driver's) were as the machine had them.",
        "",
        f"| compile cache | {' | '.join(COLUMNS)} | compiled files |",
        f"|{'---|' * (len(COLUMNS) + 2)}",
    ]
    for start in starts:
        cells = [f"{getattr(start, name):.1f}" for name in COLUMNS.values()]
        lines.append(f"| {start.compile_cache} | {' | '.join(cells)} | {start.compiled_files} |")
    for state, medians in content["medians"].items():
        if medians:
            cells = [f"{medians[name]:.1f}" for name in COLUMNS.values()]
            lines.append(f"| **{state}, median** | {' | '.join(cells)} | |")
    return "\n".join(lines) + "\n"
