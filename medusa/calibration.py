"""What the heads are worth, measured on the backbone's own replies, without decoding again.

Under exact acceptance a reply does not depend on the tree, so replies that were decoded plainly tell, step by step,
what any tree would have accepted: `walk` follows the engine's steps over a known reply. At temperature 0 in float32
the two are equal; this is how trees are compared before one is served.

Shapes: B replies, T positions, K heads, S guesses a head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from medusa.heads import DraftHeads, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.tree import Path, TokenTree, grow

_PRIOR = 20.0
Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, reply ids


@dataclass(frozen=True)
class ReplyGuesses:
    """A reply and the heads' guesses along it: `guesses[i][k]` are head k's, best first, for reply[i + k + 1].

    They are made on the hidden state of the token before reply[i]; i = 0 is the last prompt token.
    """

    reply: list[int]
    guesses: list[list[list[int]]]


def guess_replies(
    backbone: Backbone, heads: DraftHeads, rows: Iterable[Row], width: int, *, batch_size: int = 16
) -> Iterator[ReplyGuesses]:
    """Runs backbone and heads over known replies, teacher-forced, in padded batches; results in the rows' order."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            yield from _guess_batch(backbone, heads, batch, width)
            batch = []
    if batch:
        yield from _guess_batch(backbone, heads, batch, width)


def head_accuracy(replies: Iterable[ReplyGuesses], num_heads: int, width: int) -> tuple[list[list[float]], int]:
    """accuracy[head][rank]: how often head k's rank-th guess is the true token; and the number of positions.

    Every position counts where all heads have a token to guess, so that heads are compared on the same ones.
    """
    hits = [[0] * width for _ in range(num_heads)]
    positions = 0
    for item in replies:
        for i in range(len(item.reply) - num_heads):
            positions += 1
            for k in range(num_heads):
                target = item.reply[i + k + 1]
                if target in item.guesses[i][k]:
                    hits[k][item.guesses[i][k].index(target)] += 1
    return [[hit / max(positions, 1) for hit in head] for head in hits], positions


def path_values(
    replies: Iterable[ReplyGuesses], accuracy: Sequence[Sequence[float]], num_nodes: int
) -> dict[Path, float]:
    """How often each path of guesses is the reply's own continuation, all of it: what a node of a tree is worth.

    Heads are not independent, so this is not the product of their accuracies. Paths too rare to be measured lean on
    that product, which counts as `_PRIOR` positions; those of the `num_nodes` best by it are valued even if never seen.
    """
    counts: Counter[Path] = Counter({path: 0 for path in grow(accuracy, num_nodes).paths[1:]})
    positions = 0
    for item in replies:
        for i in range(len(item.reply) - len(accuracy)):
            positions += 1
            path: Path = ()
            for k, guesses in enumerate(item.guesses[i]):
                target = item.reply[i + k + 1]
                if target not in guesses:
                    break
                path = (*path, guesses.index(target))
                counts[path] += 1
    return {
        path: (count + _PRIOR * math.prod(accuracy[k][rank] for k, rank in enumerate(path))) / (positions + _PRIOR)
        for path, count in counts.items()
    }


def grow_measured(values: Mapping[Path, float], num_nodes: int) -> TokenTree:
    """The tree of the most valuable paths. A path is never worth more than its parent, so the best are a tree."""
    if num_nodes < 1:
        raise ValueError(f"a token tree has at least 1 node, got {num_nodes}")
    best = sorted(values, key=lambda path: (-values[path], len(path), path))
    return TokenTree.from_paths(best[: num_nodes - 1])


def walk(item: ReplyGuesses, tree: TokenTree) -> list[int]:
    """Tokens that each decode step of the engine adds to this reply under exact acceptance: `accepted_per_step`."""
    children = set(tree.paths)
    steps: list[int] = []
    root = 0  # the reply's token that the next tree starts from
    while root < len(item.reply) - 1:
        path: tuple[int, ...] = ()
        while root + len(path) + 1 < len(item.reply) and len(path) < len(item.guesses[root]):
            guesses, target = item.guesses[root][len(path)], item.reply[root + len(path) + 1]
            if target not in guesses or (*path, guesses.index(target)) not in children:
                break
            path = (*path, guesses.index(target))
        kept = min(len(path) + 1, len(item.reply) - 1 - root)
        steps.append(kept)
        root += kept
    return steps


def tokens_per_step(replies: Iterable[ReplyGuesses], tree: TokenTree) -> float:
    """Mean acceptance length over a set: tokens of decode steps over decode steps (1.0 without any step)."""
    steps = [kept for item in replies for kept in walk(item, tree)]
    return sum(steps) / len(steps) if steps else 1.0


def _guess_batch(backbone: Backbone, heads: DraftHeads, rows: Sequence[Row], width: int) -> Iterator[ReplyGuesses]:
    sequences = [[*prompt, *reply] for prompt, reply in rows]
    longest = max(len(ids) for ids in sequences)
    padded = [ids + [0] * (longest - len(ids)) for ids in sequences]
    hidden_BTd = backbone.hidden_states(torch.tensor(padded, device=backbone.device))
    for (prompt, reply), hidden_Td in zip(rows, hidden_BTd, strict=True):
        made_on = hidden_Td[len(prompt) - 1 : len(prompt) + len(reply) - 1]
        yield ReplyGuesses(list(reply), _guess_along(backbone, heads, made_on, reply, width).tolist())


@torch.no_grad()
def _guess_along(
    backbone: Backbone, heads: DraftHeads, hidden_Td: torch.Tensor, reply: Sequence[int], width: int
) -> torch.Tensor:
    """[T, K, S]. Heads that see their path are given the reply's own tokens: exact acceptance keeps no other path."""
    if isinstance(heads, MedusaHeads):
        return heads.guess(hidden_Td, backbone.lm_head_weight, width, backbone.cap)[0]
    if not isinstance(heads, HydraHeads):
        raise TypeError(f"no way is known to walk a reply with {type(heads).__name__}")
    num_heads = heads.config.num_heads
    tokens = torch.tensor([*reply, *[0] * (num_heads - 1)], device=hidden_Td.device)  # past the end: never compared
    ahead_TK = tokens.unfold(0, num_heads, 1)
    guesses = [
        heads.guess_next(
            k, hidden_Td, ahead_TK[:, : k + 1], backbone.embed, backbone.lm_head_weight, width, backbone.cap
        )
        for k in range(num_heads)
    ]
    return torch.stack([ids for ids, _ in guesses], 1)
