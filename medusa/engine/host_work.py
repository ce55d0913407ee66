"""What a request may want of a step that only the host does: penalties, logit bias, grammars, log-probabilities.

Such a step is launched in two halves; in between logits change as the request asks, in float32 and along each node's
path, as plain decoding would change them. Shapes: N nodes of one sequence, L prompts that end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from medusa.engine.gpu_step import NUM_STOP_IDS
from medusa.engine.logprobs import token_logprobs
from medusa.engine.sequence import Sequence
from medusa.engine.step import Done, Launched, StepTokens
from medusa.engine.tree_rows import TreeRows
from medusa.sampling import forbid_end, penalise, restrict
from medusa.tree import TokenTree


def needs_host(sequence: Sequence) -> bool:
    """Whether the sequence's steps are launched in two halves."""
    return sequence.params.logprobs is not None or changes_logits(sequence)


def changes_logits(sequence: Sequence) -> bool:
    params = sequence.params
    # The GPU masks the stop ids that it knows until min_tokens are reached; beyond those it takes the host.
    masks = params.min_tokens > 0 and len(sequence.stop_ids) > NUM_STOP_IDS
    return params.changes_logits or masks


class HostWork:
    """Changes logits and reads log-probabilities for sequences whose host state is up to date."""

    def __init__(self, trees: TreeRows) -> None:
        self._trees = trees

    def change(
        self,
        sequences: Items[Sequence],
        trees: Items[TokenTree],
        starts: Items[int],
        logits_MV: torch.Tensor,
        tokens_M: torch.Tensor,
    ) -> torch.Tensor:
        """A step's logits as the requests want them; the same tensor if none wants a change."""
        if not any(map(changes_logits, sequences)):
            return logits_MV
        changed_MV = logits_MV.to(torch.float32, copy=True)
        for sequence, tree, start in zip(sequences, trees, starts, strict=True):
            if changes_logits(sequence):
                nodes = slice(start, start + tree.num_nodes)
                ancestors_NN, depth_N = self._trees.arranged(tree)
                changed_NV = _changed(sequence, changed_MV[nodes], tokens_M[nodes], ancestors_NN, depth_N)
                changed_MV[nodes] = _in_grammar(sequence, changed_NV, tokens_M[nodes], self._trees.parents(tree))
        return changed_MV

    def change_first(
        self, sequences: Items[Sequence], wanted: Items[bool], logits_LV: torch.Tensor, tokens_L: torch.Tensor
    ) -> torch.Tensor:
        """The same for first tokens; `wanted` tells which of the sequences draw one."""
        if not any(want and changes_logits(s) for s, want in zip(sequences, wanted, strict=True)):
            return logits_LV
        changed_LV = logits_LV.to(torch.float32, copy=True)
        itself = torch.ones(1, 1, dtype=torch.bool, device=logits_LV.device)
        for i, sequence in enumerate(sequences):
            if wanted[i] and changes_logits(sequence):
                depth = torch.zeros(1, dtype=torch.int64, device=logits_LV.device)
                changed_1V = _changed(sequence, changed_LV[i, None], tokens_L[i, None], itself, depth)
                changed_LV[i] = _in_grammar(sequence, changed_1V, tokens_L[i, None], [-1])[0]
        return changed_LV

    def logprobs(
        self,
        sequences: Items[Sequence],
        starts: Items[int],
        logits_MV: torch.Tensor,
        path_BD: torch.Tensor,
        launched: Launched,
    ) -> Launched:
        """The step's tokens with log-probabilities where they are asked for; waits for the step if any are."""
        if all(sequence.params.logprobs is None for sequence in sequences):
            return launched
        steps, paths = launched.collect(), path_BD.tolist()
        for b, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if sequence.params.logprobs is not None:
                nodes = [start + node for node in paths[b] if node >= 0]
                steps[b] = _with_logprobs(sequence, steps[b], logits_MV[nodes])
        return Done(steps)

    def first_logprobs(
        self, sequences: Items[Sequence], wanted: Items[bool], logits_LV: torch.Tensor, launched: Launched
    ) -> Launched:
        """The same for first tokens."""
        if not any(want and s.params.logprobs is not None for s, want in zip(sequences, wanted, strict=True)):
            return launched
        steps = launched.collect()
        for i, sequence in enumerate(sequences):
            if wanted[i] and sequence.params.logprobs is not None:
                steps[i] = _with_logprobs(sequence, steps[i], logits_LV[i, None])
        return Done(steps)


def _changed(
    sequence: Sequence,
    logits_NV: torch.Tensor,
    tokens_N: torch.Tensor,
    ancestors_NN: torch.Tensor,
    depth_N: torch.Tensor,
) -> torch.Tensor:
    params = sequence.params
    logits_NV = penalise(logits_NV, params, sequence.prompt_ids, sequence.output_ids, tokens_N, ancestors_NN)
    if sequence.is_early:
        stop_ids, num_tokens = sorted(sequence.stop_ids), len(sequence.output_ids)
        logits_NV = forbid_end(logits_NV, stop_ids, num_tokens, params.min_tokens, depth_N)
    return logits_NV


def _in_grammar(
    sequence: Sequence, logits_NV: torch.Tensor, tokens_N: torch.Tensor, parents: list[int]
) -> torch.Tensor:
    if sequence.params.grammar is None:
        return logits_NV
    allowed_NV = sequence.allowed(tokens_N.tolist(), parents)
    assert allowed_NV is not None
    return restrict(logits_NV, allowed_NV.to(logits_NV.device))


def _with_logprobs(sequence: Sequence, step: StepTokens, logits_DV: torch.Tensor) -> StepTokens:
    assert sequence.params.logprobs is not None
    return StepTokens(step.token_ids, token_logprobs(logits_DV, step.token_ids, sequence.params.logprobs))
