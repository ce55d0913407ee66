"""What a benchmark leaves: one JSON file, one Markdown page, plots. Each file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Interval, Row

COLUMNS = ("contender", "T", "tokens/s", "steady tokens/s", "end to end", "tokens a step", "step, ms", "nodes")
COLUMNS += ("over plain", "all at once", "steady")
OWN_COLUMNS = ("over own", "own, all at once", "own, steady")  # of rows with a grammar
OF_OWN = (
    "Over own: the same three ratios, of a row in which one of the requests that run together has a grammar, to its",
    "contender's own row without. The grammar allows every token, so replies are the same: below 1 is what it costs",
    "that all of the batch's steps wait for the host, which follows the grammar and makes its masks.",
)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a file beside `path`, which then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_results(folder: Path, settings: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> None:
    """decode.json, decode.md and a plot for each of tokens/s, ratio to plain and step time by concurrency."""
    content = {"settings": settings, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    write_atomically(folder / "decode.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    write_atomically(folder / "decode.md", lambda path: path.write_text(markdown(settings, rows, notes)))
    plotted = [row for row in rows if row.over_own is None]  # a row with a grammar is compared with its own, no peer
    if plotted:
        _plot(folder / "tokens_per_second.png", plotted, "tokens a second", lambda row: row.tokens_per_second)
        label = "tokens a second over plain (steady, else all at once)"
        _plot(folder / "over_plain.png", plotted, label, _over_plain, level=1.0)
        _plot(folder / "step_ms.png", plotted, "median step, ms", _step_ms)


def markdown(settings: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A page with a table for each concurrency."""
    columns = _columns(rows)
    lines = [
        "# Decoding",
        "",
        *(f"- {name}: {value}" for name, value in settings.items() if isinstance(value, str | int | float)),
        "",
    ]
    for concurrency in sorted({row.concurrency for row in rows}):
        group = [row for row in rows if row.concurrency == concurrency]
        requests = sorted({f"{row.requests} replies, {row.repeats} runs" for row in group})
        lines += [f"## {concurrency} at once ({'; '.join(requests)})", ""]
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cells[column] for column in columns)} |" for cells in map(_cells, group)]
        lines.append("")
    lines += [
        "Speeds are medians over the runs, first and third quartile in brackets, of decoding alone; end to end",
        "includes the prefill, where this engine finds prompts that it has answered before in its cache: it compares",
        "this engine's rows alone, and Hugging Face, which computes every prompt each time, has none.",
        "A wave ends with its longest reply; all at once is the speed over plain's while every request of a wave",
        "decodes, which is when steps are timed too (medians); both are left out where one had always ended.",
        "Steady is a load that stays at so many: whenever a request ends the next of a queue takes its place. Its",
        "speed is that of reply tokens after each request's first, from when the first requests have all been",
        "prefilled until a place stays empty, over the whole time between, which includes the prefill of those that",
        "join. Prompts cost every contender the same: where no note says otherwise, each finds them in the cache, but",
        "for what lies behind a prompt's last full page. With new prompts the ratio to plain's speed, taken run by",
        "run, would be nearer to 1. Hugging Face has waves alone.",
        "Of copy: the bytes that a step has to read, over its time, as a share of the rate at which the device copies",
        "memory (read and write counted).",
        *(OF_OWN if set(OWN_COLUMNS) <= set(columns) else ()),
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _columns(rows: Sequence[Row]) -> list[str]:
    own = OWN_COLUMNS if any(row.over_own for row in rows) else ()
    idle = ["GPU idle"] if any(row.gpu_idle_share is not None for row in rows) else []
    return [*COLUMNS, *own, "of copy", *idle]


def _cells(row: Row) -> dict[str, str]:
    own = row.over_own
    return {
        "contender": row.contender,
        "T": f"{row.temperature:g}",
        "tokens/s": _interval(row.tokens_per_second, 0),
        "steady tokens/s": _interval(row.steady, 0),
        "end to end": f"{row.end_to_end.median:.0f}" if row.end_to_end else "",
        "tokens a step": f"{row.tokens_per_step:.2f}",
        "step, ms": f"{row.step_ms:.2f}" if row.step_ms is not None else "",
        "nodes": f"{row.nodes:.1f}",
        "over plain": _interval(row.ratio, 3),
        "all at once": _interval(row.full_ratio, 3),
        "steady": _interval(row.steady_ratio, 3),
        "over own": _interval(own and own.ratio, 3),
        "own, all at once": _interval(own and own.full_ratio, 3),
        "own, steady": _interval(own and own.steady_ratio, 3),
        "of copy": f"{row.bandwidth_share:.0%}" if row.bandwidth_share is not None else "",
        "GPU idle": f"{row.gpu_idle_share:.1%}" if row.gpu_idle_share is not None else "",
    }


def _over_plain(row: Row) -> Interval | None:
    """Of a steady load; where there was none, while all requests of a wave decode."""
    return row.steady_ratio or row.full_ratio


def _step_ms(row: Row) -> Interval | None:
    return None if row.step_ms is None else Interval(row.step_ms, row.step_ms, row.step_ms)


def _interval(value: Interval | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _plot(
    path: Path,
    rows: Sequence[Row],
    label: str,
    value: Callable[[Row], Interval | None],
    level: float | None = None,
) -> None:
    from matplotlib.figure import Figure

    if not any(value(row) for row in rows):
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.contender for row in rows):
        points = [(row.concurrency, interval) for row in rows if row.contender == name and (interval := value(row))]
        if points:
            xs, intervals = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            medians = [interval.median for interval in intervals]
            below = [interval.median - interval.low for interval in intervals]
            above = [interval.high - interval.median for interval in intervals]
            axes.errorbar(xs, medians, yerr=[below, above], marker="o", markersize=4, capsize=2, label=name)
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row.concurrency for row in rows}), [str(c) for c in sorted({r.concurrency for r in rows})])
    axes.set_xlabel("requests at once")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=130))
