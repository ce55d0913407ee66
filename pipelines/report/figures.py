"""The figures of a report, as inline SVG; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from medusa.tree import TokenTree
from pipelines.report.drawing import STAND_IN, WIDTH, drawing, head_colour, head_line
from pipelines.report.inputs import CalibrationResult, TrainingRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_curves(records: Sequence[TrainingRecord], *, measure: str) -> str:
    """Each head's "loss" or "top-1" over the steps of training, named at its right end."""
    steps = [record.step for record in records]
    by_head = list(zip(*(record.loss_K if measure == "loss" else record.top1_K for record in records), strict=True))
    show = (lambda value: f"{value:.2f}") if measure == "loss" else _percent
    with drawing(f"{measure} by training step", height=280) as (figure, svg):
        axes = figure.subplots()
        for k, values in enumerate(by_head):
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=head_colour(k), linewidth=1.8, marker=marker, linestyle=head_line(k))
        if measure != "loss":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="optimiser step", ylabel="cross-entropy (nats)" if measure == "loss" else "top-1 accuracy")
        ends = [(values[-1], f"head {k}: {show(values[-1])}", head_colour(k)) for k, values in enumerate(by_head)]
        _label_right(axes, steps[-1], ends)
    return svg()


def accuracy_map(calibration: CalibrationResult) -> str:
    """A cell for each head and rank, in percent; the shade follows the number."""
    accuracy = calibration.accuracy
    top = max(max(head, default=0.0) for head in accuracy) or 1.0
    with drawing("accuracy by head and rank", height=70 + 38 * len(accuracy)) as (figure, svg):
        axes = figure.subplots()
        for k, head in enumerate(accuracy):
            for rank, value in enumerate(head):
                _cell(axes, k, rank, value, strength=(value / top) ** 0.6)
        ranks = max(len(head) for head in accuracy)
        axes.set(xlim=(-0.5, ranks - 0.5), ylim=(len(accuracy) - 0.5, -0.5), xlabel="rank of the guess, best first")
        axes.set_xticks(range(ranks), [str(rank) for rank in range(ranks)])
        axes.set_yticks(range(len(accuracy)), [f"head {k}" for k in range(len(accuracy))])
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return svg()


def tokens_by_size(calibration: CalibrationResult) -> str:
    """Tokens a step of each tree of the ladder, walked, beside the product of accuracies and what it is off by."""
    rows = calibration.ladder
    sizes = [row.nodes for row in rows]
    with drawing("tokens a step by tree size", height=300) as (figure, svg):
        axes = figure.subplots()
        product = [row.product_estimate for row in rows]
        walked = [row.tokens_per_step for row in rows]
        axes.plot(sizes, product, color=STAND_IN["muted"], linewidth=1.4, linestyle=(0, (4, 3)))
        axes.plot(sizes, walked, color=STAND_IN["accent"], linewidth=2, marker="o", markersize=4)
        labelled = set(_spaced(sizes, sizes[-1] ** 0.13))
        for row in rows:
            if row.nodes in labelled and row.nodes > 1:
                place = (row.nodes, max(row.product_estimate, row.tokens_per_step))
                _note(axes, f"{row.product_error:+.1%}", place, (-3, 5), "muted", ha="right")
        _size_axis(axes, sizes)
        axes.set(ylabel="tokens a step")
        axes.margins(y=0.16)
        ends = [(product[-1], f"product: {product[-1]:.2f}", STAND_IN["muted"])]
        _label_right(axes, sizes[-1], [*ends, (walked[-1], f"walked: {walked[-1]:.2f}", STAND_IN["accent"])])
        _mark(axes, calibration.chosen_nodes, dict(zip(sizes, walked, strict=True)), above=False)
    return svg()


def speed_by_size(calibration: CalibrationResult) -> str:
    """What each tree promises in tokens a second, above the time of its step."""
    rows = calibration.ladder
    sizes = [row.nodes for row in rows]
    speeds, times = [row.tokens_per_second for row in rows], [row.step_seconds * 1000 for row in rows]
    with drawing("expected speed and step time by tree size", height=360) as (figure, svg):
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        above.plot(sizes, speeds, color=STAND_IN["accent"], linewidth=2, marker="o", markersize=4)
        above.margins(y=0.2)
        if sizes[0] == 1:
            above.plot([1, sizes[-1]], [speeds[0]] * 2, color=STAND_IN["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
            _label_right(above, sizes[-1], [(speeds[0], f"plain: {speeds[0]:,.0f}", STAND_IN["muted"])])
        speed_of = dict(zip(sizes, speeds, strict=True))
        _mark(above, calibration.chosen_nodes, speed_of, show=lambda speed: f"{speed:,.0f} tokens/s")
        above.set(ylabel="expected tokens/s")
        above.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        below.plot(sizes, times, color=STAND_IN["ink"], linewidth=1.6, marker="o", markersize=3.5)
        below.set(ylabel="step time (ms)")
        below.set_ylim(bottom=0, top=max(times) * 1.15)
        _size_axis(below, sizes)
    return svg()


def tokens_by_category(by_category: Mapping[str, float], counts: Mapping[str, int], overall: float) -> str:
    """A line from 1, plain decoding's tokens a step, to each category's; the mean over all as a vertical line."""
    ordered = sorted(by_category.items(), key=lambda item: item[1])
    with drawing("tokens a step by category", height=80 + 26 * len(ordered)) as (figure, svg):
        axes = figure.subplots()
        axes.axvline(overall, color=STAND_IN["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
        for row, (category, value) in enumerate(ordered):
            axes.plot([1, value], [row, row], color=STAND_IN["accent"], linewidth=2.2, solid_capstyle="butt")
            axes.plot([value], [row], color=STAND_IN["accent"], marker="o", markersize=6.5)
            count = counts.get(category)
            replies = f" ({count} {'reply' if count == 1 else 'replies'})" if count else ""
            _note(axes, f"{value:.2f}{replies}", (value, row), (9, -4), "ink", ha="left", behind="paper")
        axes.set_yticks(range(len(ordered)), [_shortened(category) for category, _ in ordered])
        axes.set(xlabel="tokens a step (plain decoding: 1)", ylim=(-0.7, len(ordered) - 0.1))
        axes.set_xlim(1, max(*by_category.values(), overall, 1.1) + 0.45 * (max(by_category.values()) - 1))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        place = (overall, len(ordered) - 0.1)
        _note(axes, f"all {overall:.2f}", place, (0, 3), "muted", ha="center")
    return svg()


def tree_picture(tree: TokenTree, accuracy: Sequence[Sequence[float]]) -> str:
    """The tree from left to right, a column for each head; a node shows its rank, an edge's width how often a step
    gets there by the product of accuracies."""
    height_of, leaves = _tree_layout(tree)
    row_height = max(11.0, min(19.0, 1100 / leaves))
    with drawing(f"token tree of {tree.num_nodes} nodes", height=int(58 + row_height * leaves)) as (figure, svg):
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, WIDTH), ylim=(58 + row_height * leaves, 0))
        column = min((WIDTH - 96) / max(tree.max_depth, 1), 150)
        places = {path: (34 + column * len(path), 58 + row_height * height_of[path]) for path in tree.paths}
        for path in reversed(tree.paths):
            if path:
                _edge(axes, places[path[:-1]], places[path], len(path) - 1, _reached(path, accuracy))
        for path in tree.paths:
            _node(axes, path, places[path], row_height, _reached(path, accuracy))
        for depth in range(tree.max_depth + 1):
            head = f"head {depth - 1}" if depth else "root"
            colour = head_colour(depth - 1) if depth else STAND_IN["ink"]
            x = 34 + column * depth
            axes.text(x, 16, head, color=colour, fontsize=12, weight="bold", ha="center")
            axes.text(x, 32, f"t + {depth + 1}", color=STAND_IN["muted"], fontsize=11.5, ha="center")
    return svg()


def _tree_layout(tree: TokenTree) -> tuple[dict[tuple[int, ...], int], int]:
    """Rows: leaves one below the other, a parent beside its first child, so that the best guesses run straight."""
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {path: [] for path in tree.paths}
    for path in tree.paths[1:]:
        children[path[:-1]].append(path)
    rows: dict[tuple[int, ...], int] = {}
    leaves = 0

    def place(path: tuple[int, ...]) -> int:
        nonlocal leaves
        rows_below = [place(child) for child in children[path]]
        if not rows_below:
            leaves += 1
        rows[path] = rows_below[0] if rows_below else leaves - 1
        return rows[path]

    place(())
    return rows, leaves


def _reached(path: Sequence[int], accuracy: Sequence[Sequence[float]]) -> float:
    value = 1.0
    for head, rank in enumerate(path):
        value *= accuracy[head][rank] if head < len(accuracy) and rank < len(accuracy[head]) else 0.0
    return value


def _edge(axes: Axes, start: tuple[float, float], end: tuple[float, float], head: int, probability: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bend = (start[0] + end[0]) / 2
    curve = Path([start, (bend, start[1]), (bend, end[1]), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    width = 0.7 + 9 * probability
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=head_colour(head), linewidth=width, capstyle="butt"))


def _node(axes: Axes, path: Sequence[int], place: tuple[float, float], row_height: float, probability: float) -> None:
    colour = head_colour(len(path) - 1) if path else STAND_IN["ink"]
    size = min(14.0, row_height - 1)
    axes.plot(*place, marker="o", markersize=size, color=STAND_IN["paper"], markeredgecolor=colour, zorder=3)
    font = {"fontsize": size * 0.68, "ha": "center", "zorder": 4}
    axes.text(place[0], place[1] + size * 0.24, str(path[-1]) if path else "", color=STAND_IN["ink"], **font)
    if path:
        text = _percent(probability)
        axes.text(place[0] + 10, place[1] - 3, text, color=STAND_IN["muted"], fontsize=10, zorder=4)


def _cell(axes: Axes, head: int, rank: int, value: float, strength: float) -> None:
    from matplotlib.patches import Rectangle

    shade = 0.03 + 0.52 * strength  # never so strong that the text would need another colour
    box = Rectangle((rank - 0.47, head - 0.46), 0.94, 0.92, facecolor=STAND_IN["accent"], alpha=shade, linewidth=0)
    axes.add_patch(box)
    text = f"{100 * value:.0f}" if value >= 0.0995 else f"{100 * value:.1f}"
    axes.text(rank, head, text, color=STAND_IN["ink"], fontsize=11.5, ha="center", va="center_baseline")


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = _spaced(sizes, sizes[-1] ** 0.06)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    axes.set_xlabel("nodes of the tree")


def _spaced(sizes: Sequence[int], ratio: float) -> list[int]:
    """Those of the ascending sizes that a logarithmic axis keeps apart, always with the last."""
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or size * ratio <= kept[0]:
            kept.insert(0, size)
    return kept


def _mark(
    axes: Axes,
    nodes: int,
    value_of: Mapping[int, float],
    *,
    show: Callable[[float], str] = lambda value: f"{value:.2f}",
    above: bool = True,
) -> None:
    """A ring around the chosen tree, with its size and value."""
    if nodes not in value_of:
        return
    place = (nodes, value_of[nodes])
    colour = STAND_IN["head-1"]
    axes.plot(*place, marker="o", markersize=11, color=colour, markerfacecolor="none", markeredgewidth=2, zorder=4)
    many = "node" if nodes == 1 else "nodes"
    sizes = sorted(value_of)
    where = sizes.index(nodes) / max(len(sizes) - 1, 1)
    align = "right" if where > 0.75 else "center" if where > 0.25 and above else "left"
    offset = (0 if align == "center" else 8, 12 if above else -40 if align == "right" else -19)
    _note(axes, f"chosen: {nodes} {many}, {show(place[1])}", place, offset, "head-1", ha=align)


def _note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    role: str,
    *,
    ha: str,
    behind: str | None = None,
) -> None:
    box = {"facecolor": STAND_IN[behind], "edgecolor": "none", "pad": 1.5} if behind else None
    axes.annotate(
        text, place, offset, textcoords="offset points", color=STAND_IN[role], fontsize=11.5, ha=ha, bbox=box,
        annotation_clip=False,
    )  # fmt: skip


def _label_right(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names lines beside their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    previous = low - gap
    for y, text, colour in sorted(end for end in ends if not math.isnan(end[0])):
        previous = max(y, previous + gap)
        axes.annotate(
            text, (x, previous), (8, 0), textcoords="offset points", color=colour, fontsize=11.5, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"


def _shortened(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
