"""The parts as JSON, one Markdown table and a plot; each file appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Interval
from benchmarks.results import write_atomically
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.points import Point, Status, of_linear

COLUMNS = ("part", "series", "workers", "median (quartiles)", "unit", "of linear", "target", "beside")
SHARED = (
    "Workers on CPUs share the machine's cores, so their growth says nothing of workers with a device each: such "
    "figures show that a part runs with that many workers, and no ratio is given."
)


@dataclass(frozen=True)
class Part:
    """What came of a part. `why` tells of a state other than "measured"."""

    name: str
    status: Status
    machine: Machine
    settings: dict[str, Any]
    points: tuple[Point, ...] = ()
    why: str = ""
    seconds: float = 0.0
    started: str = ""

    def with_point(self, point: Point) -> Part:
        """In the place of an earlier one of its series and number of workers."""
        others = [p for p in self.points if (p.series, p.workers) != (point.series, point.workers)]
        return replace(self, points=(*others, point))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Part:
        points = tuple(Point.from_dict(point) for point in content["points"])
        known = {name: value for name, value in content.items() if name != "of_linear"}  # which follows from the points
        return cls(**{**known, "machine": Machine(**content["machine"]), "points": points})


def write_report(out: Path, parts: Sequence[Part], *, plot: bool) -> None:
    """scale.json and scale.md of all parts, and scale.png where it is asked for and matplotlib is installed."""
    content = {"parts": [{**asdict(part), "of_linear": shares(part)} for part in parts]}
    write_atomically(out / "scale.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    write_atomically(out / "scale.md", lambda path: path.write_text(markdown(parts)))
    if plot and _can_plot():
        _plot(out / "scale.png", parts)


def shares(part: Part) -> list[dict[str, Any]]:
    """Of linear growth, by series and workers; none where workers have no device of their own."""
    if not part.machine.workers_apart:
        return []
    found = [(point, of_linear(point, part.points)) for point in part.points]
    return [
        {"series": point.series, "workers": point.workers, **asdict(share)}
        for point, share in found
        if share is not None
    ]


def markdown(parts: Sequence[Part]) -> str:
    lines = ["# Scaling", ""]
    for words in dict.fromkeys(part.machine.words for part in parts):
        names = ", ".join(part.name for part in parts if part.machine.words == words)
        lines.append(f"- {names}: {words}")
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for part in parts:
        lines += [f"| {' | '.join(_cells(part, point))} |" for point in _ordered(part)]
    lines.append("")
    lines += [f"- {part.name}: {part.status}. {part.why}" for part in parts if part.status != "measured"]
    if any(not part.machine.workers_apart for part in parts):
        lines += ["", SHARED]
    lines += [
        "",
        "Medians over repeats, first and third quartile in brackets, warm-up not counted. Of linear: the median over "
        "as many times the one worker's of the same part and run; its ends pair the quartiles that are furthest apart.",
    ]
    return "\n".join(lines) + "\n"


def told(point: Point) -> str:
    """A line for whoever watches."""
    return f"  {point.series}, {point.workers} worker(s): {_interval(point.interval)} {point.unit}"


def _ordered(part: Part) -> list[Point]:
    series = list(dict.fromkeys(point.series for point in part.points))
    return sorted(part.points, key=lambda point: (series.index(point.series), point.workers))


def _cells(part: Part, point: Point) -> list[str]:
    share = of_linear(point, part.points) if part.machine.workers_apart and point.workers > 1 else None
    beside = [f"{name} {_number(value)}" for name, value in point.told.items() if value is not None]
    return [
        part.name,
        point.series,
        str(point.workers),
        _interval(point.interval),
        point.unit,
        _interval(share) if share else "",
        f"{point.target:g}" if share else "",
        ", ".join(beside),
    ]


def _interval(value: Interval) -> str:
    return f"{_number(value.median)} ({_number(value.low)} to {_number(value.high)})"


def _number(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "/".join(_number(item) for item in value)
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _can_plot() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _plot(path: Path, parts: Sequence[Part]) -> None:
    """A panel a part that grows with workers; dashed: as many times the one worker."""
    from matplotlib.figure import Figure

    shown = [part for part in parts if len({point.workers for point in part.points}) > 1]
    if not shown:
        return
    figure = Figure(figsize=(6, 3.2 * len(shown)), layout="constrained")
    for axes, part in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        for series in dict.fromkeys(point.series for point in part.points):
            points = sorted((p for p in part.points if p.series == series), key=lambda point: point.workers)
            workers, intervals = [p.workers for p in points], [p.interval for p in points]
            ends = [[i.median - i.low for i in intervals], [i.high - i.median for i in intervals]]
            drawn = axes.errorbar(
                workers, [i.median for i in intervals], yerr=ends, marker="o", capsize=2, label=series
            )
            if part.machine.workers_apart and workers[0] == 1 and len(workers) > 1:
                linear = [n * intervals[0].median for n in workers]
                axes.plot(workers, linear, "--", linewidth=0.8, color=drawn[0].get_color())
        axes.set_title(f"{part.name} on {part.machine.gpu or part.machine.cpu}", loc="left", fontsize=9)
        axes.set_xlabel("workers")
        axes.set_ylabel(part.points[0].unit)
        axes.set_xticks(sorted({point.workers for point in part.points}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=130))
