"""The report of `medusa bench serve`: serve.json and serve.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.paced import Pacing
from benchmarks.results import write_atomically
from benchmarks.serving import Comparison, Cpu, Load, Side, Through, reply_range
from deployments.config import ServerConfig


def write_report(
    directory: Path,
    config: ServerConfig,
    load: Load,
    through: Through,
    rows: Sequence[Comparison],
    pacing: Pacing | None = None,
) -> Path:
    """serve.json and serve.md in `directory`; returns the latter."""
    content = _settings(config, load, through, pacing) | {
        "rows": [asdict(row) | {"share": row.share, "added_first_token_s": row.added_first_token_s} for row in rows]
    }
    _write_json(directory, content)
    report = directory / "serve.md"
    write_atomically(report, lambda path: path.write_text(_markdown(content, rows)))
    return report


def write_engine_alone(
    directory: Path,
    config: ServerConfig,
    load: Load,
    through: Through,
    pacing: Pacing | None,
    sides: Sequence[Side],
) -> None:
    """What is known before the service runs: serve.json, marked as partial, which `write_report` replaces."""
    rows = [{"concurrency": c, "engine": asdict(side)} for c, side in zip(load.concurrencies, sides, strict=True)]
    partial = {"partial": "the engine alone; the service was not measured yet"}
    _write_json(directory, partial | _settings(config, load, through, pacing) | {"rows": rows})


def machine() -> str:
    """The GPU's name, or what processor there is."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def _settings(config: ServerConfig, load: Load, through: Through, pacing: Pacing | None) -> dict[str, Any]:
    return {
        "machine": machine(),
        "model": config.served_name,
        "heads": config.heads,
        "speculation": config.speculation,
        "paced": asdict(pacing) | {"step_times": pacing.step_times.to_dict()["step_times"]} if pacing else None,
        "through": through,
        "load": asdict(load),
    }


def _write_json(directory: Path, content: dict[str, Any]) -> None:
    write_atomically(directory / "serve.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


def _markdown(content: dict[str, Any], rows: Sequence[Comparison]) -> str:
    load = content["load"]
    shortest, longest = reply_range(load["reply_tokens"])
    lines = [
        f"# What REST costs: {content['model']} on {content['machine']}",
        "",
        f"{load['requests']} requests for each concurrency, {load['prompt_tokens']} prompt tokens, replies of "
        f"{shortest} to {longest} tokens ({load['reply_tokens']} on average), {_decoding(content)}, streamed from "
        f"/v1/{load['route']} through {content['through']}; the client runs on the same machine.",
        "",
        "| concurrency | engine, tokens/s | REST, tokens/s | REST / engine | first token: engine | REST | added |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.concurrency} | {row.engine.tokens_per_second:.1f} | {row.service.tokens_per_second:.1f} "
            f"| {row.share:.1%} | {1000 * row.engine.first_token_median_s:.1f} ms "
            f"| {1000 * row.service.first_token_median_s:.1f} ms | {1000 * row.added_first_token_s:.1f} ms |"
        )
    lines += [
        "",
        "A step is the time from one to the next. Processor time is for each 1,000 tokens: of the engine alone, and",
        "with REST of the engine's thread, of the service's event loop and of the client.",
        "",
        "| concurrency | step: engine | REST | CPU: engine alone | engine's thread | event loop | client |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        alone, served = row.engine.cpu, row.service.cpu
        cells = [
            _milliseconds(alone, "engine"),
            *(_milliseconds(served, name) for name in ("engine", "loop", "client")),
        ]
        lines.append(
            f"| {row.concurrency} | {1000 * row.engine.step_s:.2f} ms | {1000 * row.service.step_s:.2f} ms "
            f"| {' | '.join(cells)} |"
        )
    if not content["paced"]:
        lines += [
            "",
            "On a GPU the engine's processor time includes the driver's busy waiting for the device, which is no work.",
        ]
    return "\n".join(lines) + "\n"


def _decoding(content: dict[str, Any]) -> str:
    if content["paced"]:
        return "**a paced engine without a device: the host's cost, no speed of decoding**"
    return f"speculation {content['speculation']}"


def _milliseconds(cpu: Cpu | None, name: str) -> str:
    return f"{1000 * getattr(cpu, name):.1f} ms" if cpu else ""
