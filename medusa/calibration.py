"""What the heads are worth, measured on the backbone's own replies, without decoding again.

Under exact acceptance a reply does not depend on the tree, so replies that were decoded plainly tell, step by step,
what any tree would have accepted: `walk` follows the engine's steps over a known reply. At temperature 0 in float32
the two are equal; this is how trees are compared before one is served.

Shapes: B replies, T positions, K heads, S guesses a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from medusa.heads import DraftHeads, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.tree import Accuracy, Path, TokenTree, grow_in_order

Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, reply ids
ROOTS_OF = 8  # nodes of the tree whose steps tell where paths are counted
PATH_PRIOR = 10.0  # a head's own accuracy counts as much as so many sights of the parent path


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


def grow_on(replies: Sequence[ReplyGuesses], accuracy: Accuracy, num_nodes: int) -> tuple[list[Path], list[float]]:
    """The tree whose whole paths were right most often, as its paths in the order of growth, and how often each was.

    Counted where steps begin: right after a miss, where guesses are worse than elsewhere. Products of accuracies over
    all positions overlook that, and that heads do not fail independently. Where steps begin depends on the tree, so one
    of ROOTS_OF nodes is grown first, on all positions. Rarely seen paths are drawn towards `accuracy`.
    """
    everywhere = _grow(_path_counts(replies, len(accuracy), _all_positions), accuracy, min(num_nodes, ROOTS_OF))
    tree = TokenTree.from_paths(path for path, _ in everywhere)
    growth = _grow(_path_counts(replies, len(accuracy), lambda item: _roots(item, tree)), accuracy, num_nodes)
    return [path for path, _ in growth], [value for _, value in growth]


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


def _grow(hits: Counter[Path], accuracy: Accuracy, num_nodes: int) -> list[tuple[Path, float]]:
    def given_parent(path: Path) -> float:
        rate = accuracy[len(path) - 1][path[-1]]
        return (hits[path] + PATH_PRIOR * rate) / (hits[path[:-1]] + PATH_PRIOR)

    return grow_in_order([len(head) for head in accuracy], given_parent, num_nodes)


def _path_counts(
    replies: Iterable[ReplyGuesses], num_heads: int, positions: Callable[[ReplyGuesses], Iterable[int]]
) -> Counter[Path]:
    """How often each path of ranks led to the reply's own tokens; the root, (), counts the positions."""
    hits: Counter[Path] = Counter()
    for item in replies:
        for i in positions(item):
            if i + num_heads >= len(item.reply):
                continue  # not every head has a token to guess
            path: Path = ()
            hits[path] += 1
            for guesses, target in zip(item.guesses[i], item.reply[i + 1 :], strict=False):
                if target not in guesses:
                    break
                path = (*path, guesses.index(target))
                hits[path] += 1
    return hits


def _all_positions(item: ReplyGuesses) -> Iterable[int]:
    return range(len(item.reply))


def _roots(item: ReplyGuesses, tree: TokenTree) -> Iterable[int]:
    """Where the steps of a walk begin."""
    return accumulate(walk(item, tree)[:-1], initial=0)


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
    weight_Vd, cap = backbone.lm_head_weight, backbone.cap
    guesses = [
        heads.guess_next(k, hidden_Td, ahead_TK[:, : k + 1], backbone.embed, weight_Vd, width, cap)
        for k in range(num_heads)
    ]
    return torch.stack([ids for ids, _ in guesses], 1)
