"""What it costs that steps wait for the host: rows in which one of the requests that run together has a grammar.

On a GPU the host is a step behind. A grammar's masks follow from the tokens before, so while one request has a grammar
every step of the batch waits for the host (medusa/engine/graph_runner.py). The grammar here allows every token: the row
decodes what its contender decodes without one, and what it loses is the cost of waiting and of the masks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.contenders import Contender, EngineContender, Run
from benchmarks.measure import OverOwn, Row, paired
from benchmarks.workload import Request
from medusa import Engine
from medusa.config import ConfigError
from medusa.grammar import Grammar

TEMPERATURE = 0.0
# A regular expression for all text would forbid tokens that are no whole characters.
ANY_TOKENS = Grammar("lark", "start: <[*]>*")


def check_grammar_rows(temperatures: Sequence[float]) -> None:
    """Raises ConfigError where there can be no such rows."""
    if TEMPERATURE not in temperatures:
        raise ConfigError(
            f"--grammar compares with the rows of temperature 0, and --temperatures lists {temperatures}; add 0"
        )
    if importlib.util.find_spec("llguidance") is None:
        raise ConfigError(
            "--grammar needs the extra `grammar` (pip install medusa-on-ray[grammar]), which is not installed; "
            "install it or leave the option out"
        )


def with_grammar(contender: EngineContender) -> EngineContender:
    """The same contender, with a grammar for one of the requests that run together."""
    return replace(contender, name=f"{contender.name}, one grammar", without=contender.name, grammar=ANY_TOKENS)


def for_grammar(engine: Engine, requests: Sequence[Request]) -> tuple[list[Request], list[str]]:
    """The requests whose greedy replies are the same under the grammar, since any of them may have to have it, and what
    the report notes. Raises ConfigError where there is none."""
    replies = engine.generate([r.prompt_ids for r in requests], [r.params(TEMPERATURE) for r in requests])
    kept = [r for r, reply in zip(requests, replies, strict=True) if stays(engine, reply.token_ids)]
    if not kept:
        raise ConfigError(
            "--grammar: every prompt's reply goes on past its end or has special tokens, which no grammar allows; give "
            "other prompts, or leave the option out"
        )
    notes = []
    if left_out := len(requests) - len(kept):
        notes.append(
            f"{left_out} of {len(requests)} prompts were left out, since a grammar would change their replies: they go "
            "on past their end or have special tokens"
        )
    if engine.backbone.device.type != "cuda":
        notes.append(
            "on a CPU every step waits for the host, with a grammar or without: the rows with a grammar tell what its "
            "masks cost there, and nothing of waiting"
        )
    return kept, notes


def stays(engine: Engine, reply: Sequence[int]) -> bool:
    """Whether the grammar allows each token of the reply, of which only the last may be an end."""
    if not engine.tokenizer.eos_token_ids.isdisjoint(reply[:-1]):
        return False
    matcher = engine.grammars.start(ANY_TOKENS)
    for token_id in reply:
        if not matcher.allowed([token_id], [-1])[0, token_id]:  # after the tokens taken; node 0's own is not read
            return False
        matcher.advance([token_id])
    return True


def over_own(contenders: Sequence[Contender], runs: Mapping[str, Sequence[Run]], rows: Sequence[Row]) -> list[Row]:
    """The contenders' rows, those with a grammar beside their contender's own without."""
    return [
        replace(row, over_own=_over_own(runs[contender.name], runs[contender.without]))
        if isinstance(contender, EngineContender) and contender.without
        else row
        for contender, row in zip(contenders, rows, strict=True)
    ]


def why_other_replies(rows: Sequence[Row]) -> list[str]:
    """For the notes, where replies with a grammar are others than without."""
    return [
        f"{row.over_own.other_replies} of {row.requests * row.repeats} replies of {row.contender} are others than "
        "without it: which requests share a step differs, and with it how the step rounds"
        for row in rows
        if row.over_own and row.over_own.other_replies
    ]


def _over_own(own: Sequence[Run], without: Sequence[Run]) -> OverOwn:
    return OverOwn(
        ratio=paired(own, without, lambda run: run.tokens_per_second),
        full_ratio=paired(own, without, lambda run: run.full_tokens_per_second),
        steady_ratio=paired(own, without, lambda run: run.steady_tokens_per_second),
        other_replies=sum(
            reply != other.replies[seed]
            for run, other in zip(own, without, strict=True)
            for seed, reply in run.replies.items()
        ),
    )
