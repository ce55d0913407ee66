"""Medusa's decoding step as pure functions: propose a tree of drafts, then accept what the model itself would say.

Exact acceptance draws one token a node from the model and descends while a child holds the drawn token; the first
draw that no child holds is the bonus token. Each emitted token is a draw from the model given what precedes it, so
the reply has the law of plain decoding at any temperature. Drawing once per *node* is essential: drawing once per
path would give a draft several chances. Typical acceptance (paper, section 2.3.1) is faster and changes the law.

Shapes: B sequences, N nodes, D deepest depth, K heads, S guesses a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from medusa.tree import TokenTree


@dataclass(frozen=True)
class Typical:
    """Typical acceptance: a draft with probability above min(epsilon, delta * exp(-entropy)) is kept (lossy).

    The token after the accepted drafts is the most likely one (root "greedy", as in the paper) or drawn ("sampled").
    At temperature 0, and for requests that ask for it, the step is that of exact acceptance.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    root: Literal["greedy", "sampled"] = "greedy"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1 or not 0 < self.delta <= 1:
            raise ValueError(f"typical acceptance needs 0 < epsilon < 1 and 0 < delta <= 1, got {self}")
        if self.root not in ("greedy", "sampled"):
            raise ValueError(f"typical acceptance's root is 'greedy' or 'sampled', got {self.root!r}")


@dataclass(frozen=True)
class TreeBatch:
    """One token tree a sequence, padded to the largest; `valid_BN` tells nodes from padding, never a token id."""

    parent_BN: torch.Tensor
    depth_BN: torch.Tensor
    rank_BN: torch.Tensor
    valid_BN: torch.Tensor
    ancestors_BNN: torch.Tensor
    max_depth: int

    @classmethod
    def stack(cls, trees: Sequence[TokenTree], device: torch.device) -> TreeBatch:
        def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value).to(device)

        num_nodes = max(tree.num_nodes for tree in trees)
        ancestors_BNN = torch.eye(num_nodes, dtype=torch.bool).repeat(len(trees), 1, 1)
        for row, tree in zip(ancestors_BNN, trees, strict=True):
            row[: tree.num_nodes, : tree.num_nodes] = tree.ancestors
        return cls(
            parent_BN=pad([torch.tensor(tree.parent) for tree in trees], 0).clamp(min=0),
            depth_BN=pad([torch.tensor(tree.depth) for tree in trees], 0),
            rank_BN=pad([torch.tensor(tree.rank) for tree in trees], 0).clamp(min=0),
            valid_BN=pad([torch.ones(tree.num_nodes, dtype=torch.bool) for tree in trees], 0),
            ancestors_BNN=ancestors_BNN.to(device),
            max_depth=max(tree.max_depth for tree in trees),
        )


@dataclass(frozen=True)
class Accepted:
    """What a step keeps. `path_BD` lists the accepted nodes from the root on, -1 after the last; `last_B` is that last
    node, `bonus_B` the model's own token after it, `num_B` the nodes on the path (= the tokens emitted)."""

    path_BD: torch.Tensor
    last_B: torch.Tensor
    bonus_B: torch.Tensor
    num_B: torch.Tensor


def propose(tree: TreeBatch, root_B: torch.Tensor, guesses_BKS: torch.Tensor) -> torch.Tensor:
    """The draft tokens, [B, N]: node (r1 .. rd) holds head d-1's guess of rank rd; the root holds the last token."""
    rows = torch.arange(len(root_B), device=root_B.device)[:, None]
    drafts_BN = guesses_BKS[rows, (tree.depth_BN - 1).clamp(min=0), tree.rank_BN]
    return torch.where(tree.depth_BN > 0, drafts_BN, root_B[:, None])


def match(tree: TreeBatch, tokens_BN: torch.Tensor, samples_BN: torch.Tensor) -> torch.Tensor:
    """Which drafts are what the model drew at their parent, [B, N]; the root always is."""
    return (tokens_BN == samples_BN.gather(1, tree.parent_BN)) | (tree.depth_BN == 0)


def typical(tree: TreeBatch, tokens_BN: torch.Tensor, logits_BNV: torch.Tensor, rule: Typical) -> torch.Tensor:
    """Which drafts are typical under the model's distribution at their parent (paper, section 2.3.1), [B, N].

    `logits_BNV` is what sampling would draw from (`SamplingBatch.distribution`).
    """
    logprobs_BNV = logits_BNV.log_softmax(-1)
    entropy_BN = -torch.special.xlogy(logprobs_BNV.exp(), logprobs_BNV.exp()).sum(-1)
    threshold_BN = torch.clamp(rule.delta * torch.exp(-entropy_BN), max=rule.epsilon)
    rows = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
    probability_BN = logprobs_BNV[rows, tree.parent_BN, tokens_BN].exp()
    return (probability_BN > threshold_BN.gather(1, tree.parent_BN)) | (tree.depth_BN == 0)


def accept(
    tree: TreeBatch, kept_BN: torch.Tensor, samples_BN: torch.Tensor, score_BN: torch.Tensor | None = None
) -> Accepted:
    """Keeps the deepest node all of whose ancestors are kept. Where several are deepest the highest `score_BN` wins
    (typical acceptance: the path's log-probability); exact acceptance never has several."""
    whole_BN = ((kept_BN & tree.valid_BN)[:, None, :] | ~tree.ancestors_BNN).all(-1)  # a node is its own ancestor too
    depth_BN = torch.where(whole_BN, tree.depth_BN, -1)
    if score_BN is not None:
        deepest_BN = depth_BN == depth_BN.amax(-1, keepdim=True)
        last_B = torch.where(deepest_BN, score_BN, float("-inf")).argmax(-1)
    else:
        last_B = depth_BN.argmax(-1)
    rows = torch.arange(len(last_B), device=last_B.device)
    num_B = tree.depth_BN[rows, last_B] + 1
    return Accepted(_path(tree, last_B), last_B, samples_BN[rows, last_B], num_B)


def accept_typical(
    tree: TreeBatch,
    tokens_BN: torch.Tensor,
    logits_BNV: torch.Tensor,
    distribution_BNV: torch.Tensor,
    samples_BN: torch.Tensor,
    exact_B: torch.Tensor,
    rule: Typical,
) -> Accepted:
    """The deepest path of typical drafts, of several the most likely; where `exact_B`, that of drafts as drawn.

    `distribution_BNV` is what sampling draws from (`SamplingBatch.distribution`), `logits_BNV` that before temperature.
    """
    exact_B1 = exact_B[:, None]
    typical_BN = typical(tree, tokens_BN, distribution_BNV, rule)
    kept_BN = torch.where(exact_B1, match(tree, tokens_BN, samples_BN), typical_BN)
    bonus_BN = logits_BNV.argmax(-1) if rule.root == "greedy" else samples_BN
    rows = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
    logprob_BN = distribution_BNV.log_softmax(-1)[rows, tree.parent_BN, tokens_BN]
    logprob_BN = torch.where(tree.depth_BN > 0, logprob_BN, 0.0).nan_to_num(neginf=-1e4)
    path_logprob_BN = (tree.ancestors_BNN * logprob_BN[:, None]).sum(-1)
    return accept(tree, kept_BN, torch.where(exact_B1, samples_BN, bonus_BN), path_logprob_BN)


def _path(tree: TreeBatch, last_B: torch.Tensor) -> torch.Tensor:
    """The nodes from the root to each `last_B` by depth, [B, D + 1], -1 after the last."""
    rows = torch.arange(len(last_B), device=last_B.device)
    beyond = tree.max_depth + 1  # a column for the nodes off the path, dropped at the end
    column_BN = torch.where(tree.ancestors_BNN[rows, last_B], tree.depth_BN, beyond)
    node_BN = torch.arange(column_BN.shape[1], device=last_B.device).expand_as(column_BN)
    path_BD = torch.full((len(last_B), beyond + 1), -1, device=last_B.device)
    return path_BD.scatter_(1, column_BN, node_BN)[:, :beyond]
