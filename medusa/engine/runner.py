"""The reference runner, in plain torch: prefill of chunks and decode steps over trees, done when launched (`step.py`).
Here tensors and host meet. It runs on any device; what a faster runner does must equal it.

Device state has one row a running sequence: its committed length, its last token (the next tree's root), how many
heads guessed for it, and what the drafter (medusa/drafter.py) remembers.

Shapes: B sequences of a step, N nodes, K heads, S guesses a head, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from medusa.checkpoint import Checkpoint
from medusa.decoding import Accepted, TreeBatch, Typical, accept, accept_typical, match
from medusa.drafter import Drafter, make_drafter
from medusa.engine.kv_cache import PAGE_SIZE, KVCache
from medusa.engine.logprobs import token_logprobs
from medusa.engine.sequence import Sequence
from medusa.engine.shapes import Buckets
from medusa.engine.step import Done, PrefillChunk, StepTokens
from medusa.heads import DraftHeads
from medusa.kernels.linear import pack
from medusa.kernels.tree_attention import PagedTree
from medusa.model import Backbone
from medusa.sampling import SamplingBatch, forbid_end, penalise, restrict
from medusa.tree import Path, TokenTree

MAX_PADDED_TOKENS = 2048  # of one prefill forward, to bound its memory


@dataclass(frozen=True)
class _Batch:
    """What stays the same on the device while the same sequences step with the same trees."""

    sequences: list[Sequence]
    rows: list[int]
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
        self._heads = checkpoint.heads if checkpoint else None
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

    @property
    def lag(self) -> int:
        return 0

    @property
    def buckets(self) -> Buckets | None:
        return None

    @torch.inference_mode()
    def prefill(self, chunks: Items[PrefillChunk], *, num_heads: int) -> Done:
        """As StepRunner.prefill; a chunk is a chain of tokens over what is in the sequence's pages already."""
        steps: dict[Sequence, StepTokens] = {}
        for group in _prefill_groups(chunks, self._cache.tables.shape[1] * PAGE_SIZE):
            for chunk, tokens in zip(group, self._prefill_group(group, num_heads), strict=True):
                steps[chunk.sequence] = tokens if chunk.gives_token else replace(tokens, token_ids=[], logprobs=[])
        return Done([steps[chunk.sequence] for chunk in chunks])

    @torch.inference_mode()
    def decode(self, sequences: Items[Sequence], trees: Items[TokenTree], *, num_heads: int) -> Done:
        """As StepRunner.decode."""
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
        return Done(_to_host(sequences, tokens_BN, accepted, logits_BNV))

    @torch.no_grad()
    def take_heads(self, heads: DraftHeads, growth: Items[Path]) -> DraftHeads:
        """As StepRunner.take_heads."""
        assert self._heads is not None
        self._heads.load_state_dict(heads.state_dict())
        return self._heads

    def rewind(self, sequences: Items[Sequence], length: int) -> None:
        """As StepRunner.rewind."""
        rows_B = self._rows(sequences)
        self._length[rows_B] = length
        self._num_guessed[rows_B] = self._drafter.num_heads if self._drafter is not None else 0

    def _on_device(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> _Batch:
        rows = [sequence.row for sequence in sequences]
        known = self._batch
        if known is None or (known.sequences, known.rows, known.trees) != (list(sequences), rows, list(trees)):
            self._batch = self._to_device(sequences, trees)
        assert self._batch is not None
        return self._batch

    def _to_device(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> _Batch:
        device = self._backbone.device
        return _Batch(
            sequences=list(sequences),
            rows=[sequence.row for sequence in sequences],
            trees=list(trees),
            rows_B=self._rows(sequences),
            tree=TreeBatch.stack(trees, device),
            sampling=SamplingBatch.stack(
                [s.params for s in sequences], [s.seed for s in sequences], [s.index for s in sequences], device
            ),
        )

    def _prefill_group(self, chunks: list[PrefillChunk], num_heads: int) -> list[StepTokens]:
        """A chunk is a chain: every token's parent is the one before, and it has a depth of its own."""
        device = self._backbone.device
        sequences = [chunk.sequence for chunk in chunks]
        batch = self._to_device(sequences, [TokenTree.root()] * len(chunks))
        start_B = torch.tensor([chunk.start for chunk in chunks], device=device)
        size_B = torch.tensor([len(chunk.token_ids) for chunk in chunks], device=device)
        longest = int(size_B.max())
        padded = [chunk.token_ids + [0] * (longest - len(chunk.token_ids)) for chunk in chunks]
        tokens_BN = torch.tensor(padded, device=device)
        chain_N = torch.arange(longest, device=device)
        chain = TreeBatch(
            parent_BN=(chain_N - 1).clamp(min=0).expand_as(tokens_BN),
            depth_BN=chain_N.expand_as(tokens_BN),
            rank_BN=torch.zeros_like(tokens_BN),
            valid_BN=chain_N < size_B[:, None],
            ancestors_BNN=(chain_N[:, None] >= chain_N).expand(len(chunks), -1, -1),
            max_depth=longest - 1,
        )
        hidden_BNd = self._forward(batch.rows_B, start_B, chain, tokens_BN)
        last_hidden_Bd = hidden_BNd[torch.arange(len(chunks), device=device), size_B - 1]
        end_B = start_B + size_B
        logits_B1V = self._backbone.logits(last_hidden_Bd)[:, None]
        accepted = self._accept(batch, batch.tree, tokens_BN[:, :1], logits_B1V, end_B)
        told_B = torch.tensor([-1 if c.next_token is None else c.next_token for c in chunks], device=device)
        root_B = torch.where(told_B >= 0, told_B, accepted.bonus_B)
        needs_heads = any(chunk.is_last for chunk in chunks)
        self._commit(batch.rows_B, end_B, root_B, last_hidden_Bd, num_heads if needs_heads else 0)
        steps = _to_host(sequences, tokens_BN[:, :1], accepted, logits_B1V)
        return [self._with_prompt(chunk, *pair) for chunk, *pair in zip(chunks, steps, hidden_BNd, strict=True)]

    def _with_prompt(self, chunk: PrefillChunk, step: StepTokens, hidden_Nd: torch.Tensor) -> StepTokens:
        """Adds what the model made of the prompt's tokens that follow the chunk's, where that is asked for."""
        if not chunk.sequence.needs_prompt_logprobs:
            return step
        following = chunk.sequence.prompt_ids[chunk.start + 1 : chunk.end + 1]
        if not following:
            return step
        logits_DV = self._backbone.logits(hidden_Nd[: len(following)])
        wanted = chunk.sequence.params.prompt_logprobs or 0
        return replace(step, prompt_logprobs=token_logprobs(logits_DV, following, wanted))

    def _forward(
        self, rows_B: torch.Tensor, length_B: torch.Tensor, tree: TreeBatch, tokens_BN: torch.Tensor
    ) -> torch.Tensor:
        paged = PagedTree(
            cache=self._cache.data,
            tables_BP=self._cache.tables[rows_B].long(),
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
        if self._acceptance is None or batch.sampling.all_exact:
            return accept(tree, match(tree, tokens_BN, samples_BN), samples_BN)
        distribution_BNV = batch.sampling.distribution(logits_BNV)
        return accept_typical(
            tree, tokens_BN, logits_BNV, distribution_BNV, samples_BN, batch.sampling.exact, self._acceptance
        )

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

    def _rows(self, sequences: Items[Sequence]) -> torch.Tensor:
        return torch.tensor([s.row for s in sequences], device=self._backbone.device)


def _prefill_groups(chunks: Items[PrefillChunk], num_positions: int) -> list[list[PrefillChunk]]:
    """Chunks of similar size together, each group within MAX_PADDED_TOKENS where it can be; padding stays within the
    `num_positions` that a row's table of pages covers."""
    groups: list[list[PrefillChunk]] = []
    for chunk in sorted(chunks, key=lambda c: len(c.token_ids)):
        size = len(chunk.token_ids)
        group = groups[-1] if groups else []
        fits = (len(group) + 1) * size <= MAX_PADDED_TOKENS
        if group and fits and max(c.start for c in group) + size <= num_positions:
            group.append(chunk)
        else:
            groups.append([chunk])
    return groups


def _processed(
    sequences: Items[Sequence], tree: TreeBatch, tokens_BN: torch.Tensor, logits_BNV: torch.Tensor
) -> torch.Tensor:
    """Logits after min_tokens, logit_bias, penalties and grammars; only sequences that ask for them pay for them."""
    asking = [b for b, s in enumerate(sequences) if s.is_early or s.params.changes_logits]
    if not asking:
        return logits_BNV
    logits_BNV = logits_BNV.to(torch.float32, copy=True)
    for b in asking:
        sequence, params = sequences[b], sequences[b].params
        logits_BNV[b] = penalise(
            logits_BNV[b], params, sequence.prompt_ids, sequence.output_ids, tokens_BN[b], tree.ancestors_BNN[b]
        )
        if sequence.is_early:
            stop_ids, num_tokens = sorted(sequence.stop_ids), len(sequence.output_ids)
            logits_BNV[b] = forbid_end(logits_BNV[b], stop_ids, num_tokens, params.min_tokens, tree.depth_BN[b])
        if params.grammar is not None:
            allowed_NV = sequence.allowed(tokens_BN[b].tolist(), tree.parent_BN[b].tolist())
            assert allowed_NV is not None
            logits_BNV[b] = restrict(logits_BNV[b], allowed_NV.to(logits_BNV.device))
    return logits_BNV


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
        logprobs = [] if wanted is None else token_logprobs(logits_BNV[b, nodes], emitted, wanted)
        steps.append(StepTokens(emitted, logprobs))
    return steps
