"""The curves of a training run as one picture, for whoever looks at the run in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, float]
CURVES = "curves.png"


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """A panel each for the heads' losses, their top-1 accuracies, the language model's term (where the backbone learns)
    and the learning rate, over the steps. Validation is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("loss by head", "head_{}/loss"), ("top-1 accuracy by head", "head_{}/top1_accuracy")]
    panels += [("language model: loss", "lm/loss")] if any("lm/loss" in record for record in records) else []
    panels += [("learning rate", "learning_rate")]
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, pattern) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _draw(axes, title, pattern, records)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, title: str, pattern: str, records: Sequence[Record]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    for head in range(_num_heads(records) if "{}" in pattern else 1):
        name = pattern.format(head)
        line = axes.plot(*_series(records, name), label=f"head {head}" if "{}" in pattern else None)[0]
        axes.plot(*_series(records, f"validation/{name}"), "--o", color=line.get_color(), markersize=3)
    if "{}" in pattern:
        axes.legend(fontsize=8, ncols=5)
    axes.grid(alpha=0.3)


def _series(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def _num_heads(records: Sequence[Record]) -> int:
    return sum(1 for name in records[0] if name.startswith("head_") and name.endswith("/loss")) if records else 0
