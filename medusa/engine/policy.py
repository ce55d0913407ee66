"""How much to speculate: each step spends a budget of nodes over the running sequences, where they are worth most.

A node is worth the probability that the whole path to it is right. Along a path that falls, so the most valuable nodes
of all sequences together are always whole trees (prefix-closed), and spreading a budget is a global top-M. The budget
itself is the one with the most expected tokens a second, from the measured step times; plain decoding, one node a
sequence, is one of the choices.

Calibration says what a node is worth on average; each request corrects it by what it really accepted (`Acceptance`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medusa.engine.shapes import Buckets
from medusa.engine.step_times import StepTimes
from medusa.growth import GrownTree
from medusa.tree import TokenTree

Floats = npt.NDArray[np.float64]

CONTEXT_STEP = 256  # step times are looked up once for contexts that round up to the same multiple


@dataclass(frozen=True, slots=True)
class Choice:
    """One step: `nodes[b]` of sequence b's tree, the root included, in a shape of `batch` sequences and `total` nodes.

    `tokens` and `seconds` are what the policy expects of the step.
    """

    nodes: tuple[int, ...]
    batch: int
    total: int
    tokens: float
    seconds: float

    @property
    def speculates(self) -> bool:
        return max(self.nodes) > 1


@dataclass(frozen=True, slots=True)
class _Options:
    """What a batch can choose among, plain decoding first: budgets of nodes (0 is plain), the step time of each, and
    how many drafts one sequence may have in it."""

    budgets: tuple[int, ...]
    seconds: Floats
    most_drafts: tuple[int, ...]


class Policy:
    """Chooses the nodes of every sequence for each step. Equal calls in equal order give equal choices.

    The budget changes only for a gain of `margin`, or one that lasted `patience` steps; but a budget that has become
    slower than plain decoding is given up at once. With `uniform` all sequences get the same tree, as a runner that
    pads trees to the largest needs; `buckets.nodes` are then the sizes of one tree.
    """

    def __init__(
        self,
        grown: GrownTree,
        step_times: StepTimes,
        buckets: Buckets,
        *,
        uniform: bool = False,
        margin: float = 0.03,
        patience: int = 16,
    ) -> None:
        self.grown = grown
        self.step_times = step_times
        self._buckets = buckets
        self._uniform = uniform
        self._margin, self._patience = margin, patience
        self._gains: Floats = np.asarray(grown.gains)
        self._worth: Floats = np.concatenate([[0.0], np.cumsum(self._gains)])
        self._known: dict[tuple[int, int], _Options] = {}
        self._budget: int | None = None  # of the last step; 0 is plain decoding
        self._waited = 0

    def choose(self, factors: Items[float], context: int) -> Choice:
        """The step of sequences with these acceptance factors (`Acceptance.factor`) and this mean context."""
        batch = len(factors)
        if not batch:
            raise ValueError("a step has at least one sequence")
        factors_B: Floats = np.asarray(factors, dtype=np.float64)
        values_BN = np.minimum(factors_B[:, None] * self._gains, 1.0)
        options = self._options(batch, context)
        ranked = {} if self._uniform else {most: _ranked(values_BN[:, :most]) for most in set(options.most_drafts)}
        tokens = self._tokens(options, values_BN, ranked)
        chosen = self._settle(options, tokens)
        budget, most = options.budgets[chosen], options.most_drafts[chosen]
        if self._uniform or budget == 0:
            nodes = (1 + min(max(budget - 1, 0), most),) * batch
        else:
            nodes = _spread(budget - batch, values_BN[:, :most], ranked[most])
        bucket = self._buckets.batch(batch)
        total = bucket * max(budget, 1) if self._uniform else max(budget, bucket)
        return Choice(nodes, bucket, total, float(tokens[chosen]), float(options.seconds[chosen]))

    def expected(self, num_nodes: int) -> float:
        """Drafts that calibration expects a tree of so many nodes to have accepted, for `Acceptance.observe`."""
        return float(self._worth[num_nodes - 1])

    def tree(self, num_nodes: int) -> TokenTree:
        return self.grown.tree(num_nodes)

    def _tokens(self, options: _Options, values_BN: Floats, ranked: Mapping[int, Floats]) -> Floats:
        """Expected of a step with each budget."""
        batch = len(values_BN)
        if self._uniform:
            worth = np.concatenate([[0.0], np.cumsum(values_BN.sum(0))])
            return batch + worth[[min(max(budget - 1, 0), len(worth) - 1) for budget in options.budgets]]
        worths = {most: np.concatenate([[0.0], np.cumsum(values)]) for most, values in ranked.items()}
        drafts = [max(budget - batch, 0) for budget in options.budgets]
        return batch + np.array(
            [worths[most][min(n, batch * most)] for n, most in zip(drafts, options.most_drafts, strict=True)]
        )

    def _options(self, batch: int, context: int) -> _Options:
        """What this batch may choose among."""
        rounded = -(-context // CONTEXT_STEP) * CONTEXT_STEP
        if (batch, rounded) not in self._known:
            self._known[batch, rounded] = self._options_of(batch, rounded)
        return self._known[batch, rounded]

    def _options_of(self, batch: int, context: int) -> _Options:
        bucket, largest = self._buckets.batch(batch), len(self._gains) + 1
        most = largest if self._uniform else batch * largest
        useful = [n for n in self._buckets.nodes if n > (1 if self._uniform else bucket)]
        # The first bucket that holds every node there is, is the last that can be worth its price.
        budgets = (0, *useful[: bisect_left(useful, most) + 1])
        full = bucket * largest  # a larger bucket costs the same, and was measured as this
        totals = [bucket * max(n, 1) if self._uniform else min(max(n, bucket), full) for n in budgets]
        seconds = np.array([self.step_times.at(bucket, total, context) for total in totals])
        trees = [largest if self._uniform else self._buckets.largest_tree(bucket, total) for total in totals]
        return _Options(budgets, seconds, tuple(min(size or largest, largest) - 1 for size in trees))

    def _settle(self, options: _Options, tokens: Floats) -> int:
        """The index of the budget to take: the best, unless the last step's is about as good."""
        speeds = tokens / options.seconds
        best = int(speeds.argmax())
        last = options.budgets.index(self._budget) if self._budget in options.budgets else best
        gain = speeds[best] / speeds[last]
        self._waited = self._waited + 1 if gain > 1 else 0
        keep = gain < 1 + self._margin and self._waited < self._patience and speeds[last] >= speeds[0]
        chosen = last if keep else best
        if chosen == best:
            self._waited = 0
        self._budget = options.budgets[chosen]
        return chosen


def _ranked(values_BN: Floats) -> Floats:
    """The values of all sequences' drafts together, the most valuable first."""
    return np.sort(values_BN, axis=None)[::-1]


def _spread(drafts: int, values_BN: Floats, ranked: Floats) -> tuple[int, ...]:
    """Each sequence's nodes: its root, and its share of the most valuable drafts of all."""
    drafts = min(drafts, int((ranked > 0).sum()))
    if drafts == 0:
        return (1,) * len(values_BN)
    threshold = ranked[drafts - 1]
    above_B = (values_BN > threshold).sum(1)
    equal_B = (values_BN == threshold).sum(1)
    before_B = np.cumsum(equal_B) - equal_B  # ties go to the sequences in their order
    ties_B = np.clip(drafts - above_B.sum() - before_B, 0, equal_B)
    return tuple((1 + above_B + ties_B).tolist())


def best_tree(trees: Items[TokenTree], tokens_per_step: Items[float], step_times: StepTimes, batch: int) -> TokenTree:
    """The tree that gives the most tokens a second when all sequences have it; the smaller one where two are equal."""
    speeds = [
        tokens / step_times.lookup(batch, tree.num_nodes) for tree, tokens in zip(trees, tokens_per_step, strict=True)
    ]
    return trees[speeds.index(max(speeds))]
