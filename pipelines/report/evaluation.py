"""What the evaluation says: does speculation pay here, how fast is what, is it exact, and where do tokens come from."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from pipelines.report import figures
from pipelines.report.inputs import Evaluation, Measured, Reply, Version
from pipelines.report.page import Html, Tile, at_once, element, figure, missing, nodes, number, table, tiles
from registry.gate import EvaluationSummary

_SAMPLE_TOKENS = (40, 160)  # a sample reply is neither a word nor a page, where there is such a one


def verdict(evaluation: Evaluation) -> str:
    """Whether speculation pays here, in plain words."""
    measured, chosen = evaluation.measured, evaluation.summary.speculation_chosen
    load, tree = at_once(evaluation.summary.concurrency), f"a tree of {nodes(measured.nodes)}"
    times = f"{measured.speedup:.2f} times"
    runs = f" ({_between(measured)} over the paired runs)" if measured.interval else " (in a single run)"
    low, high = measured.interval or (measured.speedup, measured.speedup)
    if not chosen:
        return (
            f"Speculation does not pay here, so it is switched off: with {load}, no tree of the ladder promised enough "
            f"over plain decoding. Switched on all the same, {tree} ran at {times} the speed of plain decoding{runs}."
        )
    if high < 1:
        return (
            f"Speculation does not pay here, though calibration promised that it would: with {load}, {tree} ran at "
            f"only {times} the speed of plain decoding{runs}."
        )
    if low <= 1:
        return (
            f"Whether speculation pays here is not settled: with {load}, {tree} ran at {times} the speed of plain "
            f"decoding{runs}, which is no clear difference."
        )
    return f"Speculation pays here: with {load}, {tree} makes {times} as many tokens a second as plain decoding{runs}."


def headline(evaluation: Evaluation | None, version: Version | None) -> Iterator[Html]:
    """The verdict and the numbers behind it."""
    if evaluation is None:
        unknown = "This run was not evaluated, so it is not known whether speculation pays here."
        yield element("p", unknown, css="verdict")
        return
    yield element("p", verdict(evaluation), css="verdict")
    yield tiles([*_speed_tiles(evaluation), _lossless_tile(evaluation.summary), *_about_tiles(evaluation, version)])


def speed(evaluation: Evaluation | None) -> Iterator[Html]:
    """Both sides at every load, and whether they gave the same tokens."""
    if evaluation is None:
        yield missing("Speed by load", "Left out: there is no evaluation.")
        return
    summary = evaluation.summary
    header = ["At once", "Plain, tokens/s", "Medusa, tokens/s", "Speedup", "Range", "Tokens a step", "Speculation"]
    yield table(header, (_load_row(load, summary) for load in sorted(summary.by_concurrency, key=int)))
    yield element("p", _exactness(summary))
    if evaluation.champion is not None:
        yield element("p", _against(evaluation.measured, evaluation.champion))
    yield element(
        "p",
        f"Measured on {summary.evaluation_set.num_prompts} prompts that nothing was trained on, greedy, in one "
        "process: plain decoding is the same engine with a tree of one node. Each reply was decoded plainly first and "
        "cut where it starts to repeat itself; then both sides decoded exactly those lengths in turn. Speeds are "
        "those of the fastest run; the speedup is the median of the paired runs' ratios, the range their lowest and "
        "highest. Where speculation is off, the service decodes plainly, and the Medusa columns show what it "
        "would have given.",
        css="note",
    )


def unseen(evaluation: Evaluation | None, replies: Sequence[Reply]) -> Iterator[Html]:
    """Tokens a step by kind of prompt, and one reply with the tokens that came for free."""
    yield _categories(evaluation, replies)
    yield _sample(replies)


def _speed_tiles(evaluation: Evaluation) -> Iterator[Tile]:
    summary, measured = evaluation.summary, evaluation.measured
    load = at_once(summary.concurrency)
    runs = f" over {evaluation.repeats} paired runs" if evaluation.repeats else ""
    off = "" if summary.speculation_chosen else "; off in service"
    note = f"{_between(measured)}{runs}" if measured.interval else load
    yield Tile("Speedup", f"{measured.speedup:.2f}×", note + off)
    yield Tile("Tokens a step", f"{measured.tokens_per_step:.2f}", "plain decoding: 1")
    yield Tile("Medusa", number(summary.medusa_tokens_per_second), f"tokens/s, {load}")
    yield Tile("Plain decoding", number(summary.plain_tokens_per_second), f"tokens/s, {load}")


def _lossless_tile(summary: EvaluationSummary) -> Tile:
    replies, differing = summary.evaluation_set.num_prompts, len(summary.divergences)
    if not summary.lossless:
        return Tile("Lossless", "no", f"{differing} of {replies} replies differ from plain decoding's")
    if differing:
        return Tile("Lossless", "yes, up to ties", f"{differing} of {replies} replies part at a near-tie of rounding")
    return Tile("Lossless", "yes", f"all {replies} replies equal plain decoding's, token for token")


def _about_tiles(evaluation: Evaluation, version: Version | None) -> Iterator[Tile]:
    summary = evaluation.summary
    plain = f"plain decoding; measured with {nodes(evaluation.measured.nodes)}"
    note = "checked in one pass" if summary.speculation_chosen else plain
    yield Tile("Tree chosen", nodes(summary.tree_size), note)
    yield Tile("Number format", summary.dtype, "of model and heads")
    if version is None:
        yield Tile("Model version", "none", "nothing was registered")
    else:
        yield Tile("Model version", str(version.version), f"of {version.name}; {_standing(version)}")


def _standing(version: Version) -> str:
    if not version.gate.passed:
        return f"refused by the gate: {'; '.join(version.gate.reasons)}"
    return "passed the gate, now champion" if version.promoted else "passed the gate, not promoted"


def _load_row(load: str, summary: EvaluationSummary) -> list[str]:
    result = summary.by_concurrency[load]
    interval, on = result.speedup_interval, result.speculation_chosen is not False
    return [
        load,
        number(result.plain_tokens_per_second),
        number(result.medusa_tokens_per_second),
        f"{result.speedup:.2f}×",
        f"{interval[0]:.2f} to {interval[1]:.2f}" if interval and interval[0] < interval[1] else "single run",
        f"{result.acceptance_length:.2f}" if result.acceptance_length else "",
        (nodes(result.tree_size) if result.tree_size else "on") if on else "off",
    ]


def _exactness(summary: EvaluationSummary) -> str:
    if not summary.divergences:
        return "Every reply equals plain decoding's, token for token." if summary.lossless else "This is not lossless."
    largest = max(summary.divergences, key=lambda divergence: divergence.logit_gap)
    why = "ties that rounding breaks either way" if summary.lossless else "this is not lossless"
    return (
        f"{len(summary.divergences)} of {summary.evaluation_set.num_prompts} replies part from plain decoding's. Where "
        f"they first differ, plain decoding's two best logits lie at most {largest.logit_gap:.3g} apart (reply "
        f"{largest.id}, token {largest.position}): {why}."
    )


def _against(candidate: Measured, champion: Measured) -> str:
    return (
        f"The champion so far, measured in the same run: {champion.tokens_per_step:.2f} tokens a step and a speedup of "
        f"{champion.speedup:.2f}, against {candidate.tokens_per_step:.2f} and {candidate.speedup:.2f} of this version."
    )


def _between(measured: Measured) -> str:
    assert measured.interval is not None
    return f"{measured.interval[0]:.2f} to {measured.interval[1]:.2f}"


def _categories(evaluation: Evaluation | None, replies: Sequence[Reply]) -> Html:
    heading = "Tokens a step by category"
    if evaluation is None:
        return missing(heading, "Left out: there is no evaluation.")
    measured = evaluation.measured
    if len(measured.by_category) < 2:
        return missing(heading, "Left out: the prompts are not of several categories.")
    counts = Counter(reply.category or "none" for reply in replies)
    return figure(
        heading,
        figures.tokens_by_category(measured.by_category, counts, measured.tokens_per_step),
        "Tokens of decode steps over decode steps, summed over the replies of a category, with a tree of "
        f"{nodes(measured.nodes)}. A reply's first token comes from reading the prompt and is not counted.",
        alone=True,
    )


def _sample(replies: Sequence[Reply]) -> Html:
    heading = "A reply, step by step"
    reply = _typical(replies)
    if reply is None:
        return missing(heading, "Left out: there is no reply with a decode step.")
    tokens, steps = sum(reply.accepted_per_step), len(reply.accepted_per_step)
    counted = f"{tokens} tokens in {steps} steps, {reply.tokens_per_step:.2f} a step: "
    prompt = [element("p", reply.prompt, css="prompt")] if reply.prompt else []
    marked = _marked_by_token(reply) if reply.has_token_texts else _marked_by_step(reply)
    caption = element("p", counted, "of the replies of readable length, the one nearest to their mean. ", css="note")
    return element("div", element("h3", heading), *prompt, *marked, caption, css="part")


def _typical(replies: Sequence[Reply]) -> Reply | None:
    decoded = [reply for reply in replies if reply.accepted_per_step]
    low, high = _SAMPLE_TOKENS
    readable = [reply for reply in decoded if low <= sum(reply.accepted_per_step) <= high] or decoded
    if not readable:
        return None
    mean = statistics.fmean(reply.tokens_per_step for reply in readable)
    return min(readable, key=lambda reply: abs(reply.tokens_per_step - mean))


def _marked_by_token(reply: Reply) -> Iterator[Html]:
    assert reply.token_texts is not None
    spans, position = [element("span", reply.token_texts[0])], 1
    for kept in reply.accepted_per_step:
        guessed = reply.token_texts[position : position + kept - 1]
        spans += [element("mark", _visible("".join(guessed)))] if guessed else []
        spans.append(element("span", reply.token_texts[position + kept - 1]))
        position += kept
    yield element("div", *spans, css="reply")
    yield element(
        "p",
        "Marked tokens are guesses of the heads that the model confirmed: they came without a pass of their own. A run "
        "of them and the plain token after it is one step.",
        css="note",
    )


def _marked_by_step(reply: Reply) -> Iterator[Html]:
    """For replies without the texts of their tokens."""
    yield element("div", reply.text, css="reply")
    boxes = (element("mark" if kept > 1 else "span", kept) for kept in reply.accepted_per_step)
    yield element("p", *boxes, css="steps")
    yield element("p", "The tokens that each decode step added, in order; above 1, the rest were free.", css="note")


def _visible(text: str) -> str:
    """A confirmed line break would be marked where nobody sees it."""
    return text.replace("\n", "↵\n")
