"""The style of a report's figures, and how a matplotlib drawing becomes inline SVG with the page's colours and font.

Drawn in CSS pixels for one narrow column, so that figures read the same on a phone and on a desk. Colours are roles
(PALETTE): the drawing holds a stand-in for each, and the SVG a CSS variable, so one drawing serves light and dark.
Head k has the same colour in every figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 440
# role: (light, dark). The heads' colours are Okabe and Ito's, which colour-blind readers can tell apart, made dark
# enough for lines and small text on white, and light enough on black.
PALETTE: Mapping[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#171b20"),
    "ink": ("#1b2127", "#e7eaed"),
    "muted": ("#5b6570", "#9ba6b1"),
    "grid": ("#dde2e7", "#313941"),
    "accent": ("#0067a5", "#62b4ec"),
    "tint": ("#d3e7f4", "#1d3f57"),
    "head-0": ("#0067a5", "#62b4ec"),
    "head-1": ("#c25100", "#f4914e"),
    "head-2": ("#007a58", "#3fc79c"),
    "head-3": ("#a33f86", "#e295ca"),
    "head-4": ("#8a6500", "#e6bb4c"),
    "head-5": ("#3c7f9e", "#9cd3ee"),
}
STAND_IN = {role: f"#0b5e{index:02x}" for index, role in enumerate(PALETTE)}
_NUM_HEAD_COLOURS = sum(role.startswith("head-") for role in PALETTE)


def head_colour(head: int) -> str:
    return STAND_IN[f"head-{head % _NUM_HEAD_COLOURS}"]


def head_line(head: int) -> str:
    """Dashed where the colours come round again."""
    return ("-", "--", ":")[head // _NUM_HEAD_COLOURS % 3]


@contextmanager
def drawing(title: str, height: int) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """A figure of WIDTH by `height` pixels in the report's style, and the function that gives its SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    ink, muted = STAND_IN["ink"], STAND_IN["muted"]
    style = {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 12,
        "figure.facecolor": "none", "axes.facecolor": "none", "text.color": ink, "axes.labelcolor": muted,
        "axes.edgecolor": muted, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": STAND_IN["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True,
        "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "xtick.major.size": 3, "ytick.major.size": 0, "lines.solid_capstyle": "round",
    }  # fmt: skip
    text = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        yield figure, lambda: _inline(text.getvalue(), title)
        figure.savefig(text, format="svg", metadata={"Date": None})


def _inline(svg: str, title: str) -> str:
    """matplotlib's SVG as part of a page: no prolog, metadata or rules for the whole page, its own ids, CSS colours."""
    name = re.sub(r"\W+", "-", title)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|xlink:href=")#(\w+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|xlink:href=")#', lambda found: f"{found[1].replace('xlink:', '')}#{name}-", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    for role, stand_in in STAND_IN.items():
        svg = svg.replace(stand_in, f"var(--{role})")
    size = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    assert size is not None, "matplotlib writes a viewBox"
    label = escape(title, quote=True)
    return re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{label}" {size[0]}>', svg, count=1)
