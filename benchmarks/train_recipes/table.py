"""The comparison: one row a recipe, the targets beside what was reached, and the curves of training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
FIRST = "heldout_chat@0.0"
CLOSE_ENOUGH = 0.01  # of the base's perplexity


def write_table(work: Path) -> str:
    """WORK/results.md, results.json and curves.png, from WORK/results/*.json, and what failed; gives the text."""
    results = [json.loads(path.read_text()) for path in sorted((work / "results").glob("*.json"))]
    failed = [f"- {path.stem} failed: {path.read_text()}" for path in sorted((work / "results").glob("*.failed"))]
    if not results:
        return "".join([f"there are no results in {work / 'results'} yet\n", *failed])
    devices = ", ".join(sorted({result["device"] for result in results}))
    head = f"Tokens a step, 64-node trees grown on rows kept back from training ({devices}).\n\n"
    text = head + "\n".join([*table(results), "", *targets(results)]) + "\n" + "".join(failed)
    (work / "results.md").write_text(text)
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_curves(results, work / "curves.png")
    return text


def table(results: Iterable[Result]) -> list[str]:
    results = list(results)
    seconds = {result["recipe"]: f"{result['training']['seconds']:g}" for result in results}
    columns = sorted({key for result in results for key in result["tokens_per_step"]})
    quality_sets = sorted({key for result in results for key in result.get("quality", {})})
    ratios = [f"ppl ratio {key}" for key in quality_sets]
    header = ["recipe", "rows", "epochs", "s", "kept back", *columns, *ratios, "KL"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result in results:
        training, quality = result["training"], result.get("quality", {})
        cells = [f"{result['recipe']}: {result['about']}", str(training["rows"])]
        first = f"{seconds.get(start, '?')} + " if (start := result.get("start")) else ""
        cells += [f"{training['epochs']:g}", first + seconds[result["recipe"]]]
        cells.append(f"{chosen_by(result):.3f}" if "kept_back" in result else "")
        cells += [f"{tokens(result, c):.3f}" if c in result["tokens_per_step"] else "" for c in columns]
        cells += [f"{quality[key]['perplexity_ratio']:.4f}" if key in quality else "1" for key in quality_sets]
        cells.append(f"{quality[FIRST]['kl']:.4f}" if FIRST in quality else "0")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def targets(results: Iterable[Result]) -> list[str]:
    """What the best recipe of each kind reached, the best being that on rows kept back from training: on the rows that
    it is judged by, the best of many would be so by luck too. Nothing is said of a kind that was not measured, nor
    of a changed model whose distance from its base was not."""
    results = [result for result in results if FIRST in result["tokens_per_step"]]
    unknown = [result["recipe"] for result in results if "kept_back" not in result]
    results = [result for result in results if "kept_back" in result]
    medusa_1 = [result for result in results if is_kind(result, "m1")]
    medusa_2 = [result for result in results if is_kind(result, "m2") and result.get("quality")]
    hydra = [result for result in results if is_kind(result, "hydra")]
    lines = [f"- {name}: not judged, its result has no figure on rows kept back; train it again" for name in unknown]
    for key, needed in ((FIRST, 2.2), ("heldout_chat@1.0", 1.7)):
        if best := best_of(medusa_1):
            lines.append(verdict(f"Medusa-1, {key}", best["recipe"], tokens(best, key), needed))
    if best := best_of([r for r in medusa_2 if perplexity_change(r) <= CLOSE_ENOUGH]):
        told = f"{best['recipe']}, perplexity {perplexity_change(best):+.2%} at most"
        lines.append(verdict(f"Medusa-2, {FIRST}", told, tokens(best, FIRST), 2.7))
    elif medusa_2:
        closest = min(medusa_2, key=perplexity_change)
        lines.append(
            f"- Medusa-2: none within 1 % of the base's perplexity; closest {closest['recipe']}, "
            f"{perplexity_change(closest):+.2%}: missed"
        )
    if (one := best_of(medusa_1)) and (other := best_of(hydra)):
        ratio = tokens(other, FIRST) / tokens(one, FIRST)
        lines.append(verdict("Hydra over Medusa-1", f"{other['recipe']} over {one['recipe']}", ratio, 1.2))
    return lines


def verdict(what: str, recipe: str, found: float, needed: float) -> str:
    return f"- {what}: {found:.3f} ({recipe}), target {needed:g}: {'reached' if found >= needed else 'missed'}"


def is_kind(result: Result, prefix: str) -> bool:
    return result["recipe"].split("-")[0] == prefix and not (prefix == "m2" and "hydra" in result["recipe"])


def best_of(results: list[Result]) -> Result | None:
    return max(results, key=chosen_by, default=None)


def chosen_by(result: Result) -> float:
    found: float = result["kept_back"]["tokens_per_step"]
    return found


def tokens(result: Result, key: str) -> float:
    found: float = result["tokens_per_step"][key]["tokens_per_step"]
    return found


def perplexity_change(result: Result) -> float:
    """The worst of the sets: the base's own replies, and the references. A lower perplexity is no worse."""
    return max(found["perplexity_ratio"] - 1 for found in result["quality"].values())


def plot_curves(results: Iterable[Result], path: Path) -> None:
    """Over seconds, which is what budgets are in: each recipe's loss, and how often its first and last head are right
    (losses of different kinds do not compare)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = list(results)
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5), sharex=True)
    last = {
        result["recipe"]: max(int(k[5]) for k in result["training"]["curve"][0] if k[:5] == "head_")
        for result in results
    }
    for result in results:
        curve = result["training"]["curve"]
        seconds = [record["seconds"] for record in curve]
        keys = ("loss", "head_0/top1_accuracy", f"head_{last[result['recipe']]}/top1_accuracy")
        for panel, key in zip(panels, keys, strict=True):
            panel.plot(seconds, [record[key] for record in curve], label=result["recipe"])
    for panel, title in zip(panels, ("loss", "top-1, first head", "top-1, last head"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("seconds")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
