"""Runs the model: prefill of new sequences, and decode steps over trees. The only place where tensors and host meet.

Device state has one row a running sequence: its committed length, its last token (the next tree's root), how many
heads guessed for it, and what the drafter (medusa/drafter.py) remembers.

Shapes: B sequences of a step, N nodes, K heads, S guesses a head, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from medusa.checkpoint import Checkpoint
from medusa.decoding import Accepted, TreeBatch, Typical, accept, match, typical
from medusa.drafter import Drafter, make_drafter
from medusa.engine.kv_cache import KVCache
from medusa.engine.sequence import Sequence, TokenLogprob
from medusa.kernels.linear import pack
from medusa.kernels.tree_attention import PagedTree
from medusa.model import Backbone
from medusa.sampling import SamplingBatch, penalise
from medusa.tree import TokenTree

MAX_PREFILL_TOKENS = 2048  # padded tokens of one prefill forward, to bound its memory


@dataclass(frozen=True)
class StepTokens:
    """What a forward gave one sequence, in order; log-probabilities only when its request asks for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]


@dataclass(frozen=True)
class _Batch:
    """What stays the same on the device while the same sequences step with the same trees."""

    sequences: list[Sequence]
    trees: list[TokenTree]
    rows_B: torch.Tensor
    tree: TreeBatch
    sampling: SamplingBatch


class Runner:
    """Owns the device state of the batch; `max_batch_size` rows."""

    def __init__(
        self,
        backbone: Backbone,
        checkpoint: Checkpoint | None,
        cache: KVCache,
        *,
        max_batch_size: int,
        guess_width: int,
        acceptance: Typical | None,
    ) -> None:
        self._backbone = backbone
        self._cache = cache
        self._acceptance = acceptance
        self._drafter: Drafter | None = None
        if checkpoint is not None:
            self._drafter = make_drafter(checkpoint.heads, backbone, max_batch_size, guess_width)
        device = backbone.device
        self._length = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._root = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._num_guessed = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._batch: _Batch | None = None
        pack(backbone.model)
        if checkpoint is not None:
            pack(checkpoint.heads)

    @torch.inference_mode()
    def prefill(self, sequences: Items[Sequence], *, num_heads: int) -> list[StepTokens]:
        """Computes the prompts' keys and values, each reply's first token, and guesses of the first `num_heads`."""
        tokens: dict[int, StepTokens] = {}
        for group in _prefill_groups(sequences):
            for sequence, step_tokens in zip(group, self._prefill_group(group, num_heads), strict=True):
                tokens[id(sequence)] = step_tokens
        return [tokens[id(sequence)] for sequence in sequences]

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence], trees: list[TokenTree], *, num_heads: int) -> list[StepTokens]:
        """One step: propose, verify in one forward, accept, commit. `num_heads` heads guess for the next step; nodes
        deeper than the heads that guessed for this one take no part."""
        batch = self._on_device(sequences, trees)
        rows_B = batch.rows_B
        length_B = self._length[rows_B]
        guessed_BN = batch.tree.depth_BN <= self._num_guessed[rows_B][:, None]
        tree = replace(batch.tree, valid_BN=batch.tree.valid_BN & guessed_BN)
        tokens_BN = self._proposed(tree, rows_B)
        hidden_BNd = self._forward(rows_B, length_B, tree, tokens_BN)
        logits_BNV = self._backbone.logits(hidden_BNd)
        accepted = self._accept(batch, tree, tokens_BN, logits_BNV, length_B + 1)
        if tree.max_depth:
            self._cache.compact(rows_B, length_B, accepted.path_BD)
        last_hidden_Bd = hidden_BNd[torch.arange(len(rows_B), device=rows_B.device), accepted.last_B]
        self._commit(rows_B, length_B + accepted.num_B, accepted.bonus_B, last_hidden_Bd, num_heads)
        return _to_host(sequences, tokens_BN, accepted, logits_BNV)

    def rewind(self, sequences: list[Sequence], length: int) -> None:
        """Forgets what was committed after `length` positions; for timing the same step again. Rows then count as
        having guesses of all heads, whatever they are."""
        rows_B = self._rows(sequences)
        self._length[rows_B] = length
        self._num_guessed[rows_B] = self._drafter.num_heads if self._drafter is not None else 0

    def _on_device(self, sequences: list[Sequence], trees: list[TokenTree]) -> _Batch:
        if self._batch is None or self._batch.sequences != sequences or self._batch.trees != trees:
            device = self._backbone.device
            self._batch = _Batch(
                sequences=list(sequences),
                trees=list(trees),
                rows_B=self._rows(sequences),
                tree=TreeBatch.stack(trees, device),
                sampling=SamplingBatch.stack(
                    [s.params for s in sequences], [s.seed for s in sequences], [s.index for s in sequences], device
                ),
            )
        return self._batch

    def _prefill_group(self, sequences: list[Sequence], num_heads: int) -> list[StepTokens]:
        """A prompt is a chain: every token's parent is the one before, and it has a depth of its own."""
        device = self._backbone.device
        batch = self._on_device(sequences, [TokenTree.root()] * len(sequences))
        prompt_length_B = torch.tensor([len(s.prompt_ids) for s in sequences], device=device)
        longest = int(prompt_length_B.max())
        tokens_BN = torch.tensor([s.prompt_ids + [0] * (longest - len(s.prompt_ids)) for s in sequences], device=device)
        chain_N = torch.arange(longest, device=device)
        chain = TreeBatch(
            parent_BN=(chain_N - 1).clamp(min=0).expand_as(tokens_BN),
            depth_BN=chain_N.expand_as(tokens_BN),
            rank_BN=torch.zeros_like(tokens_BN),
            valid_BN=chain_N < prompt_length_B[:, None],
            ancestors_BNN=(chain_N[:, None] >= chain_N).expand(len(sequences), -1, -1),
            max_depth=longest - 1,
        )
        hidden_BNd = self._forward(batch.rows_B, torch.zeros_like(prompt_length_B), chain, tokens_BN)
        last_hidden_Bd = hidden_BNd[torch.arange(len(sequences), device=device), prompt_length_B - 1]
        logits_B1V = self._backbone.logits(last_hidden_Bd)[:, None]
        accepted = self._accept(batch, batch.tree, tokens_BN[:, :1], logits_B1V, prompt_length_B)
        self._commit(batch.rows_B, prompt_length_B, accepted.bonus_B, last_hidden_Bd, num_heads)
        return _to_host(sequences, tokens_BN[:, :1], accepted, logits_B1V)

    def _forward(
        self, rows_B: torch.Tensor, length_B: torch.Tensor, tree: TreeBatch, tokens_BN: torch.Tensor
    ) -> torch.Tensor:
        paged = PagedTree(
            cache=self._cache.data,
            tables_BP=self._cache.tables[rows_B],
            length_B=length_B,
            depth_BN=tree.depth_BN,
            valid_BN=tree.valid_BN,
            ancestors_BNN=tree.ancestors_BNN,
        )
        return self._backbone.tree_hidden_states(tokens_BN, length_B[:, None] + tree.depth_BN, paged)

    def _accept(
        self,
        batch: _Batch,
        tree: TreeBatch,
        tokens_BN: torch.Tensor,
        logits_BNV: torch.Tensor,
        position_B: torch.Tensor,
    ) -> Accepted:
        """`position_B` is the absolute position of the token that follows each root."""
        logits_BNV = _processed(batch.sequences, tree, tokens_BN, logits_BNV)
        samples_BN = batch.sampling.sample(logits_BNV, position_B, tree.depth_BN)
        if self._acceptance is None or batch.sampling.all_greedy:
            return accept(tree, match(tree, tokens_BN, samples_BN), samples_BN)
        return _accept_typical(tree, tokens_BN, logits_BNV, samples_BN, batch.sampling, self._acceptance)

    def _commit(
        self,
        rows_B: torch.Tensor,
        length_B: torch.Tensor,
        root_B: torch.Tensor,
        last_hidden_Bd: torch.Tensor,
        num_heads: int,
    ) -> None:
        self._length[rows_B] = length_B
        self._root[rows_B] = root_B
        self._num_guessed[rows_B] = num_heads
        if self._drafter is not None:
            self._drafter.remember(rows_B, last_hidden_Bd, num_heads)

    def _proposed(self, tree: TreeBatch, rows_B: torch.Tensor) -> torch.Tensor:
        root_B = self._root[rows_B]
        return root_B[:, None] if self._drafter is None else self._drafter.propose(tree, rows_B, root_B)

    def _rows(self, sequences: list[Sequence]) -> torch.Tensor:
        return torch.tensor([s.row for s in sequences], device=self._backbone.device)


def _prefill_groups(sequences: Items[Sequence]) -> list[list[Sequence]]:
    """Prompts of similar length together, each group within MAX_PREFILL_TOKENS of padded tokens where it can be."""
    groups: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.prompt_ids)):
        if groups and (len(groups[-1]) + 1) * len(sequence.prompt_ids) <= MAX_PREFILL_TOKENS:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _processed(
    sequences: Items[Sequence], tree: TreeBatch, tokens_BN: torch.Tensor, logits_BNV: torch.Tensor
) -> torch.Tensor:
    """Logits after min_tokens, logit_bias and penalties; only sequences that ask for them pay for them."""
    asking = [b for b, s in enumerate(sequences) if s.is_early or s.params.logit_bias or s.params.has_penalties]
    if not asking:
        return logits_BNV
    logits_BNV = logits_BNV.to(torch.float32, copy=True)
    for b in asking:
        sequence, params = sequences[b], sequences[b].params
        logits_BNV[b] = penalise(
            logits_BNV[b], params, sequence.prompt_ids, sequence.output_ids, tokens_BN[b], tree.ancestors_BNN[b]
        )
        if sequence.is_early and sequence.stop_ids:
            early_N = len(sequence.output_ids) + tree.depth_BN[b] < params.min_tokens
            stop_ids = torch.tensor(sorted(sequence.stop_ids), device=logits_BNV.device)
            logits_BNV[b, :, stop_ids] = logits_BNV[b, :, stop_ids].masked_fill(early_N[:, None], float("-inf"))
    return logits_BNV


def _accept_typical(
    tree: TreeBatch,
    tokens_BN: torch.Tensor,
    logits_BNV: torch.Tensor,
    samples_BN: torch.Tensor,
    batch: SamplingBatch,
    rule: Typical,
) -> Accepted:
    greedy_B1 = (batch.temperature == 0)[:, None]
    distribution_BNV = batch.distribution(logits_BNV)
    typical_BN = typical(tree, tokens_BN, distribution_BNV, rule)
    kept_BN = torch.where(greedy_B1, match(tree, tokens_BN, samples_BN), typical_BN)
    bonus_BN = logits_BNV.argmax(-1) if rule.root == "greedy" else samples_BN
    rows = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
    logprob_BN = distribution_BNV.log_softmax(-1)[rows, tree.parent_BN, tokens_BN]
    logprob_BN = torch.where(tree.depth_BN > 0, logprob_BN, 0.0).nan_to_num(neginf=-1e4)
    path_logprob_BN = (tree.ancestors_BNN * logprob_BN[:, None]).sum(-1)
    return accept(tree, kept_BN, torch.where(greedy_B1, samples_BN, bonus_BN), path_logprob_BN)


def _to_host(
    sequences: Items[Sequence], tokens_BN: torch.Tensor, accepted: Accepted, logits_BNV: torch.Tensor
) -> list[StepTokens]:
    """Each sequence's new tokens: the accepted drafts, then the bonus."""
    steps: list[StepTokens] = []
    rows = zip(accepted.path_BD.tolist(), tokens_BN.tolist(), accepted.bonus_B.tolist(), strict=True)
    for b, (path, tokens, bonus) in enumerate(rows):
        nodes = [node for node in path if node >= 0]
        emitted = [tokens[node] for node in nodes[1:]] + [bonus]
        wanted = sequences[b].params.logprobs
        logprobs = [] if wanted is None else _logprobs(logits_BNV[b, nodes], emitted, wanted)
        steps.append(StepTokens(emitted, logprobs))
    return steps


def _logprobs(logits_DV: torch.Tensor, emitted: list[int], num_top: int) -> list[TokenLogprob]:
    """The emitted tokens' log-probabilities at the nodes that precede them."""
    logprobs_DV = logits_DV.float().log_softmax(-1)
    top = logprobs_DV.topk(num_top, dim=-1)
    return [
        TokenLogprob(token, float(logprobs_DV[d, token]), list(zip(ids, values, strict=True)))
        for d, (token, ids, values) in enumerate(zip(emitted, top.indices.tolist(), top.values.tolist(), strict=True))
    ]
