"""The report's HTML: escaped building blocks and the one style sheet. Nothing is loaded from outside the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pipelines.report.drawing import PALETTE, WIDTH


class Html(str):
    """Text that is HTML already; any other string is escaped when it is put into a page."""


@dataclass(frozen=True)
class Tile:
    """A headline number: what it is, its value, and a line on how it is meant."""

    name: str
    value: str
    note: str = ""


def safe(text: object) -> Html:
    return text if isinstance(text, Html) else Html(escape(str(text)))


def element(tag: str, *content: object, css: str = "") -> Html:
    attribute = f' class="{escape(css)}"' if css else ""
    return Html(f"<{tag}{attribute}>{''.join(map(safe, content))}</{tag}>")


def page(title: str, *sections: Html) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_colours()}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *content: Html) -> Html:
    return element("section", element("h2", heading), *content)


def tiles(items: Iterable[Tile]) -> Html:
    boxes = [
        element("div", element("dt", item.name), element("dd", item.value), element("p", item.note), css="tile")
        for item in items
    ]
    return element("dl", *boxes, css="tiles")


def figure(heading: str, drawing: str, caption: str, *, alone: bool = False) -> Html:
    """`alone`: nothing stands beside it, so the caption may where the page is wide enough."""
    content = (element("h3", heading), Html(drawing), element("figcaption", caption))
    return element("figure", *content, css="alone" if alone else "")


def missing(heading: str, sentence: str) -> Html:
    """Stands where a part would be: says why it is not there."""
    return element("div", element("h3", heading), element("p", sentence, css="missing"), css="part")


def beside(*parts: Html) -> Html:
    """Parts side by side where the page is wide enough."""
    return element("div", *parts, css="beside")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Scrolls sideways in itself on a narrow screen, so that the page does not."""
    head = element("thead", element("tr", *(element("th", name) for name in header)))
    body = element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows))
    return element("div", element("table", head, body), css="scroll")


def facts(items: Mapping[str, object]) -> Html:
    rows = (element("tr", element("th", name), element("td", value)) for name, value in items.items())
    return element("div", element("table", element("tbody", *rows)), css="scroll facts")


def nodes(size: int) -> str:
    return "1 node" if size == 1 else f"{size} nodes"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def at_once(concurrency: int) -> str:
    return "one sequence at a time" if concurrency == 1 else f"{concurrency} sequences at once"


def _colours() -> str:
    light, dark = ("".join(f"--{role}:{colours[side]};" for role, colours in PALETTE.items()) for side in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


_STYLE = f"""
* {{ box-sizing: border-box }}
html {{ -webkit-text-size-adjust: 100% }}
body {{ margin: 0; background: var(--paper); color: var(--ink); -webkit-print-color-adjust: exact;
  print-color-adjust: exact; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }}
main {{ max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--grid) }}
h3 {{ font-size: 1rem; margin: 0 0 .5rem }}
p {{ max-width: 46rem; margin: 0 0 1rem }}
.verdict {{ font-size: 1.15rem; line-height: 1.45 }}
.note, .missing, figcaption, .tile p {{ color: var(--muted); font-size: .875rem; line-height: 1.45 }}
.tiles {{ display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1px; margin: 1.5rem 0;
  background: var(--grid); border: 1px solid var(--grid) }}
.tile {{ background: var(--paper); padding: .8rem 1rem }}
.tile dt {{ color: var(--muted); font-size: .875rem }}
.tile dd {{ margin: 0; font-size: 1.6rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }}
.tile p {{ margin: .15rem 0 0 }}
.beside {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem 2.5rem;
  align-items: start }}
figure, .part {{ margin: 0 0 1rem; min-width: 0; break-inside: avoid }}
figure svg {{ display: block; width: 100%; max-width: {WIDTH * 1.2:.0f}px; height: auto }}
figure svg * {{ stroke-linejoin: round; stroke-linecap: butt }}
figure svg text {{ font-family: inherit; font-variant-numeric: tabular-nums }}
figcaption {{ margin-top: .6rem; max-width: {WIDTH * 1.2:.0f}px }}
@media (min-width: 56rem) {{ .alone {{ display: grid; grid-template-columns: minmax(0, {WIDTH * 1.2:.0f}px) 1fr;
  column-gap: 2.5rem; margin-top: 2rem }} .alone h3 {{ grid-column: 1 / 3 }}
  h2 + .alone {{ margin-top: 0 }} .alone figcaption {{ margin: 0 }} }}
.scroll {{ overflow-x: auto; margin: 0 0 1rem }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem 1.25rem .4rem 0; border-bottom: 1px solid var(--grid) }}
th {{ font-weight: 600; color: var(--muted) }}
thead th {{ white-space: nowrap }}
.scroll td {{ white-space: nowrap }}
.facts td, .wrapped {{ white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46rem }}
.wrapped {{ min-width: 16rem }}
code {{ font: .85em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }}
.reply {{ max-width: 46rem; padding: 1rem 1.25rem; border: 1px solid var(--grid); white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.75; margin: 0 0 .75rem }}
.prompt {{ max-width: 46rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .75rem;
  padding-left: .9rem; border-left: 3px solid var(--grid) }}
mark {{ color: inherit; background: var(--tint); border-bottom: 2px solid var(--accent) }}
.steps > * {{ display: inline-block; min-width: 1.5em; padding: 0 .3em; margin: 0 2px 4px 0; text-align: center;
  font-size: .8rem; border: 1px solid var(--grid); font-variant-numeric: tabular-nums }}
.steps mark {{ border-color: var(--accent) }}
@media (max-width: 48rem) {{ .tiles {{ grid-template-columns: repeat(2, minmax(0, 1fr)) }}
  .tile {{ padding: .7rem .8rem }} .tile dd {{ font-size: 1.35rem }} main {{ padding: 1.25rem 1rem 3rem }} }}
@media print {{ @page {{ margin: 14mm }} body {{ font-size: 10.5pt }} main {{ max-width: none; padding: 0 }}
  h2 {{ break-after: avoid }} h3 {{ break-after: avoid }} tr, .tile {{ break-inside: avoid }}
  .beside {{ grid-template-columns: 1fr 1fr; gap: 1.25rem 2rem }} .scroll {{ overflow: visible }} }}
"""
