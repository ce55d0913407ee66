"""Which trees an engine's steps decode with: the same for all, or the policy's, by what was asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal, Protocol

from medusa.engine.acceptance import UsualAcceptance
from medusa.engine.drafting import Drafting
from medusa.engine.policy import Choice, Policy
from medusa.engine.profile import Profiler
from medusa.engine.sequence import Sequence
from medusa.engine.shapes import Buckets
from medusa.engine.step_times import StepTimes
from medusa.tree import TokenTree

SpeculationSetting = Literal["auto", "off"] | int


class Speculation(Protocol):
    """Which trees the sequences of a step decode with, and what became of them."""

    def trees_of(self, sequences: Items[Sequence]) -> list[TokenTree]:
        """One for each, for the step that comes."""
        ...

    def learn(self, sequence: Sequence, tree: TokenTree, num_tokens: int) -> None:
        """After a step: the sequence emitted `num_tokens` with this tree."""
        ...


@dataclass(frozen=True)
class Always:
    """The same tree for all, at any load."""

    tree: TokenTree

    def trees_of(self, sequences: Items[Sequence]) -> list[TokenTree]:
        return [self.tree] * len(sequences)

    def learn(self, sequence: Sequence, tree: TokenTree, num_tokens: int) -> None:
        pass


class Adaptive:
    """The policy's trees, by load and by what each request accepts. `choice` is the last step's.

    A new request is expected to accept what others of its temperature (to a tenth) have.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.choice: Choice | None = None
        self._usual: defaultdict[int, UsualAcceptance] = defaultdict(UsualAcceptance)

    def trees_of(self, sequences: Items[Sequence]) -> list[TokenTree]:
        if not sequences:
            return []
        for sequence in sequences:
            if not sequence.acceptance.has_begun:
                sequence.acceptance.begin(self._usual_of(sequence).factor)
        factors = [sequence.acceptance.factor for sequence in sequences]
        context = sum(sequence.num_tokens for sequence in sequences) // len(sequences)
        self.choice = self.policy.choose(factors, context)
        return [self.policy.tree(nodes) for nodes in self.choice.nodes]

    def learn(self, sequence: Sequence, tree: TokenTree, num_tokens: int) -> None:
        if tree.num_nodes == 1:
            sequence.acceptance.rest()
            return
        expected, accepted = self.policy.expected(tree.num_nodes), num_tokens - 1
        if sequence.acceptance.observe(expected, accepted):
            self._usual_of(sequence).observe(expected, accepted)

    def _usual_of(self, sequence: Sequence) -> UsualAcceptance:
        return self._usual[round(10 * sequence.params.temperature)]


def speculation_of(
    asked: SpeculationSetting | TokenTree | StepTimes,
    drafting: Drafting,
    profiler: Profiler,
    step_times: StepTimes | None = None,
) -> Speculation:
    """What was asked for, with these heads: "off", a tree, the tree of that size in the ladder, or the policy over the
    ladder. The policy goes by the step times that are asked for; with "auto", by `step_times` or, without them, by what
    is measured now. Raises ValueError for what these heads cannot do.
    """
    if asked == "off" or (asked == "auto" and drafting.checkpoint is None):
        return Always(TokenTree.root())
    if asked == "auto":
        return _adaptive(drafting, profiler, step_times)
    if isinstance(asked, StepTimes):
        return _adaptive(drafting, profiler, asked)
    if isinstance(asked, TokenTree):
        drafting.limits.check_tree(asked)
        return Always(asked)
    sizes = {tree.num_nodes: tree for tree in drafting.trees}
    if isinstance(asked, bool) or asked not in sizes:
        raise ValueError(f"speculation is 'auto', 'off' or a tree size of the ladder {sorted(sizes)}, got {asked!r}")
    return Always(sizes[int(asked)])


def _adaptive(drafting: Drafting, profiler: Profiler, step_times: StepTimes | None) -> Adaptive:
    grown, buckets = drafting.grown, profiler.buckets
    if grown is None:
        raise ValueError(
            "choosing trees by their speed needs heads with a calibrated ladder of trees; run `medusa calibrate`, "
            "or give speculation='off'"
        )
    times = step_times or profiler.measure_choices(grown, drafting.trees)
    if buckets is not None:
        return Adaptive(Policy(grown, times, buckets))
    sizes = Buckets(nodes=tuple(tree.num_nodes for tree in drafting.trees))
    return Adaptive(Policy(grown, times, sizes, uniform=True))
