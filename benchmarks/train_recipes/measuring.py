"""What a trained recipe is worth: tokens a step by the offline walk, and how far a changed model is from its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.train_recipes.replies import Asked, Reply, answer, to_pair
from medusa import Engine
from medusa.calibration import ReplyGuesses, grow_on, guess_replies, head_accuracy, tokens_per_step
from medusa.checkpoint import Calibration
from medusa.heads import DraftHeads
from medusa.model import Backbone
from medusa.quality import compare
from medusa.tree import Accuracy, TokenTree, grow

WIDTH = 10
TREE_SIZES = (1, 2, 4, 8, 16, 32, 64)
QUALITY_SETS = ("heldout_chat@0.0", "heldout_chat@1.0", "heldout_chat_reference@None")


def name_of(reply: Reply) -> str:
    return f"{reply['set']}@{reply['temperature']}"


def calibrate(backbone: Backbone, heads: DraftHeads, kept_back: Sequence[Reply]) -> tuple[Calibration, list[TokenTree]]:
    """Trees of all sizes by the whole paths of rows kept back from training, and what they are worth there."""
    guessed = list(guess_replies(backbone, heads, map(to_pair, kept_back), WIDTH, batch_size=64))
    accuracy, positions = head_accuracy(guessed, heads.config.num_heads, WIDTH)
    growth, whole_paths = grow_on(guessed, accuracy, max(TREE_SIZES))
    trees = [TokenTree.from_paths(growth[: size - 1]) for size in TREE_SIZES]
    calibration = Calibration(
        accuracy=accuracy,
        num_positions=positions,
        temperature=kept_back[0]["temperature"],
        tokens_per_step=[tokens_per_step(guessed, tree) for tree in trees],
        growth=[list(path) for path in growth],
        path_accuracy=list(whole_paths),
    )
    return calibration, trees


def measure(
    backbone: Backbone, heads: DraftHeads, evaluation: Sequence[Reply], trees: Sequence[TokenTree]
) -> dict[str, Any]:
    """By set and temperature: tokens a step with each tree, and with one of 64 nodes from the set's own accuracies (as
    some published figures are)."""
    measured: dict[str, Any] = {}
    for name in sorted({name_of(reply) for reply in evaluation}):
        rows = [to_pair(reply) for reply in evaluation if name_of(reply) == name]
        guessed = list(guess_replies(backbone, heads, rows, WIDTH, batch_size=64))
        measured[name] = worth(guessed, heads.config.num_heads, trees)
    return measured


def worth(guessed: Sequence[ReplyGuesses], num_heads: int, trees: Sequence[TokenTree]) -> dict[str, Any]:
    accuracy: Accuracy
    accuracy, positions = head_accuracy(guessed, num_heads, WIDTH)
    of_trees = {str(tree.num_nodes): round(tokens_per_step(guessed, tree), 4) for tree in trees}
    return {
        "tokens_per_step": of_trees[str(max(tree.num_nodes for tree in trees))],
        "by_nodes": of_trees,
        "own_tree": round(tokens_per_step(guessed, grow(accuracy, max(TREE_SIZES))), 4),
        "top1": [round(head[0], 4) for head in accuracy],
        "replies": len(guessed),
        "positions": positions,
    }


def own_replies(engine: Engine, replies: Sequence[Reply], max_tokens: int) -> list[Reply]:
    """What a changed model answers to the same prompts at the same temperatures and seeds."""
    asked = [Asked(r["set"], r["temperature"], r["number"], r["round"], tuple(r["prompt_ids"])) for r in replies]
    return answer(engine, asked, max_tokens)


def quality(base: Backbone, model: Backbone, replies: Sequence[Reply]) -> dict[str, Any]:
    """Against the base, on its own replies at temperature 0 and 1 and on reference replies."""
    found: dict[str, Any] = {}
    for name in QUALITY_SETS:
        rows = [to_pair(reply) for reply in replies if name_of(reply) == name]
        if rows:
            closeness = compare(base, model, rows, batch_size=64)
            found[name] = asdict(closeness) | {"perplexity_ratio": closeness.perplexity_ratio}
    return found
