"""The engine's loop: plan a step, launch it, collect what is due.

A runner of lag 1 is collected one step late: while a step runs, the host reads the one before it, so its lengths are
upper bounds until then (`Sequence.most_ahead`), and pages are taken for the longest that they can be. A reply that ends
on the host drops what a later step gave it, in tokens, text, log-probabilities, counts and known pages alike.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from medusa.engine.scheduler import Plan, Scheduler
from medusa.engine.sequence import Output, Sequence
from medusa.engine.speculation import Always, Speculation
from medusa.engine.stats import Counters
from medusa.engine.step import Launched, StepRunner, StepTokens
from medusa.tree import TokenTree


@dataclass(frozen=True)
class _InFlight:
    """A launch of step `number` that has not been collected; without `trees` a prefill."""

    number: int
    launched: Launched
    sequences: list[Sequence]
    trees: list[TokenTree] | None = None


class StepLoop:
    """Steps the sequences of a scheduler with a runner. `speculation` may change between two steps."""

    def __init__(self, runner: StepRunner, scheduler: Scheduler, counters: Counters) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._counters = counters
        self.speculation: Speculation = Always(TokenTree.root())
        self._number = 0
        self._in_flight: deque[_InFlight] = deque()  # the oldest first

    def step(self) -> list[Output]:
        """One step of all that run; returns what its launches gave, or with lag 1 those of the step before."""
        self._number += 1
        plan, outputs = self._plan()
        if plan.chunks:
            self._launch_prefill(plan)
            outputs += self._collect(self._runner.lag)
        trees = {s: tree for s, tree in zip(plan.decoding, plan.trees, strict=True) if not s.is_ending}
        if trees:
            self._launch_decode(list(trees), list(trees.values()))
        outputs += self._collect(self._runner.lag if plan.chunks or trees else 0)
        self._scheduler.retire()
        return outputs

    def clear(self) -> None:
        """Forgets all sequences and the steps in flight."""
        self._scheduler.clear()
        self._in_flight.clear()

    def _plan(self) -> tuple[Plan, list[Output]]:
        """What to do in this step. When pages run out the steps in flight are collected first: some of their sequences
        may have ended, and none that loses its pages may be in flight."""
        plan = self._scheduler.schedule(self.speculation.trees_of, may_preempt=not self._in_flight)
        if plan is not None:
            return plan, []
        outputs = self._collect(0)
        self._scheduler.retire()
        plan = self._scheduler.schedule(self.speculation.trees_of)
        assert plan is not None
        return plan, outputs

    def _launch_prefill(self, plan: Plan) -> None:
        num_heads = max((tree.max_depth for tree in plan.trees), default=0)
        launched = self._runner.prefill(plan.chunks, num_heads=num_heads)
        for chunk in plan.chunks:
            chunk.sequence.least_ahead += chunk.gives_token
            self._scheduler.note_launch(chunk)
        self._counters.count_prefill(sum(len(chunk.token_ids) for chunk in plan.chunks))
        self._in_flight.append(_InFlight(self._number, launched, [chunk.sequence for chunk in plan.chunks]))

    def _launch_decode(self, sequences: list[Sequence], trees: list[TokenTree]) -> None:
        launched = self._runner.decode(sequences, trees, num_heads=max(tree.max_depth for tree in trees))
        for sequence, tree in zip(sequences, trees, strict=True):
            sequence.least_ahead += 1
            sequence.most_ahead += tree.max_depth + 1
        self._counters.count_step(trees)
        self._in_flight.append(_InFlight(self._number, launched, sequences, trees))

    def _collect(self, lag: int) -> list[Output]:
        """What the launches gave that are `lag` steps old or older, but for replies that have ended since."""
        outputs: list[Output] = []
        while self._in_flight and self._in_flight[0].number <= self._number - lag:
            step = self._in_flight.popleft()
            for i, (sequence, tokens) in enumerate(zip(step.sequences, self._await(step), strict=True)):
                if sequence.finish_reason is not None:
                    continue
                sequence.prompt_logprobs.extend(tokens.prompt_logprobs)
                if tokens.token_ids:
                    outputs.append(self._take(sequence, step.trees[i] if step.trees else None, tokens))
        return outputs

    def _await(self, step: _InFlight) -> list[StepTokens]:
        started = time.perf_counter()
        tokens = step.launched.collect()
        if step.number < self._number:  # this step's own could not be launched later: it tells of no room
            self._counters.count_wait(time.perf_counter() - started)
        return tokens

    def _take(self, sequence: Sequence, tree: TokenTree | None, tokens: StepTokens) -> Output:
        num_drafted = tree.num_nodes - 1 if tree is not None else 0
        output = sequence.append(tokens.token_ids, tokens.logprobs, decoded=tree is not None, num_drafted=num_drafted)
        sequence.least_ahead -= 1
        if tree is not None:
            sequence.most_ahead -= tree.max_depth + 1
            sequence.num_cached = min(sequence.num_cached + len(tokens.token_ids), sequence.num_tokens)
            self._scheduler.register(sequence)
            self._counters.count_decoded(tree, output)
            self.speculation.learn(sequence, tree, len(tokens.token_ids))
        return output
