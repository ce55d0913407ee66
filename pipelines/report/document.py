"""Composes the report: the headline, then section by section what the steps found and how it was measured.

The file loads nothing and runs nothing: figures are inline SVG and the style stands in the page. It is made from
the finished steps' files alone, so it can be written again at any time.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.artifact import StepOutput
from pipelines.report import figures
from pipelines.report.evaluation import headline, speed, unseen
from pipelines.report.inputs import CalibrationResult, ReportInputs, read_inputs
from pipelines.report.page import Html, at_once, beside, element, facts, figure, missing, nodes, page, section, table


def write_report(path: Path, *, title: str, outputs: Mapping[str, StepOutput], summary: Mapping[str, Any]) -> None:
    """Writes the report of a run's steps, whole or not at all.

    `outputs` are finished steps by name; what a missing one would have shown is left out, with a sentence that says
    so. `summary` holds further facts, shown as they are. ReportError for a damaged file of a step.
    """
    inputs = read_inputs(outputs)
    html = page(
        title,
        element("header", element("h1", title), *headline(inputs.evaluation, inputs.version)),
        section("Speed and exactness", *speed(inputs.evaluation)),
        section("What the heads learned", *_heads(inputs)),
        section("Which tree pays", *_trees(inputs)),
        section("On unseen prompts", *unseen(inputs.evaluation, inputs.replies)),
        section("How it was made", *_steps(outputs, summary)),
    )
    _write_whole(Path(path), html)


def _heads(inputs: ReportInputs) -> Iterator[Html]:
    yield _training(inputs)
    heading = "Accuracy by head and rank, in percent"
    if inputs.calibration is None:
        yield missing(heading, "Left out: there is no calibration.")
        return
    yield figure(
        heading,
        figures.accuracy_map(inputs.calibration),
        f"How often each guess of a head is the true token, on {inputs.calibration.num_positions:,} positions of "
        "replies that training did not see. Only one guess of a head can be right, so a row adds up to "
        "how often the token is among its guesses.",
        alone=True,
    )


def _training(inputs: ReportInputs) -> Html:
    records = inputs.training
    if not records:
        return missing("Training curves", "Left out: the train step left no metrics.jsonl with losses by head.")
    means = (
        "a mean over the steps since the record before, so with the heads as they were then, on the model's own replies"
    )
    return beside(
        figure(
            "Loss by head",
            figures.training_curves(records, measure="loss"),
            f"Cross-entropy with the true token; {means}. Head k guesses the token k + 2 places ahead.",
        ),
        figure(
            "Top-1 accuracy by head",
            figures.training_curves(records, measure="top-1"),
            f"How often a head's best guess is the true token; {means}.",
        ),
    )


def _trees(inputs: ReportInputs) -> Iterator[Html]:
    calibration = inputs.calibration
    if calibration is None:
        yield missing("Tokens a step and speed by tree size", "Left out: there is no calibration.")
        return
    yield beside(
        figure(
            "Tokens a step by tree size",
            figures.tokens_by_size(calibration),
            "Walked: each tree was followed over held-out replies step by step, as the engine would. Product: what the "
            "heads' accuracies multiply to; heads are not independent, and the small numbers say how far it is off. "
            "Trees are chosen by the walk.",
        ),
        figure(
            "Expected speed and step time by tree size",
            figures.speed_by_size(calibration),
            f"Step times were measured on this machine with {at_once(calibration.concurrency)}; the expected speed of "
            f"one sequence is tokens a step over step time. {_choices(calibration)}",
        ),
    )
    yield _tree(inputs, calibration)


def _choices(calibration: CalibrationResult) -> str:
    if len(calibration.chosen) == 1:
        return ""
    choices = sorted(calibration.chosen.items(), key=lambda item: int(item[0]))
    return f"Chosen by number of sequences at once: {', '.join(f'{load}: {nodes(size)}' for load, size in choices)}."


def _tree(inputs: ReportInputs, calibration: CalibrationResult) -> Html:
    size, heading = calibration.chosen_nodes, "The chosen tree"
    if size == 1 and inputs.evaluation is not None:
        size, heading = inputs.evaluation.measured.nodes, "The tree that was measured, though speculation is off"
    heading = f"{heading}: {nodes(size)}"
    if size == 1:
        return missing(heading, "No picture: a tree of one node is plain decoding.")
    tree = inputs.tree(size)
    if tree is None:
        return missing(heading, "No picture: the calibrated checkpoint does not hold this tree.")
    return figure(
        heading,
        figures.tree_picture(tree, calibration.accuracy),
        "The root is the last token that the model itself chose; each column holds one head's guesses of the token "
        "that many places ahead. The number in a node is the guess's rank, 0 the best. An edge's width, and the "
        "percentage beside its node, is how often a step gets that far by the product of accuracies. One pass of the "
        "model checks all nodes.",
        alone=True,
    )


def _steps(outputs: Mapping[str, StepOutput], summary: Mapping[str, Any]) -> Iterator[Html]:
    header = ["Step", "Key", "Counts", "Digest of its outputs"]
    yield table(header, (_step_row(name, output) for name, output in outputs.items()))
    yield element(
        "p",
        "A step's key is a digest of its configuration, its version and the digests of its inputs: equal keys are "
        "equal work, done once.",
        css="note",
    )
    if summary:
        yield element("h3", "The run's summary")
        yield facts(dict(_flat(summary)))


def _step_row(name: str, output: StepOutput) -> list[object]:
    counts = ", ".join(f"{what} {count}" for what, count in _flat(output.manifest.get("counts", {})))
    digest = output.digest.removeprefix("sha256:")
    wrapped = element("div", counts, css="wrapped")
    return [name, element("code", output.key[:16]), wrapped, element("code", digest[:16])]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}: ")
        else:
            yield f"{above}{name}".replace("_", " "), _fact(value)


def _fact(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(item, list | tuple) for item in value) else ", "
        return between.join(map(_fact, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
