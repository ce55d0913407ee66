"""Kinds of trees, compared on known replies.

    accuracies   one tree, grown on the heads' accuracies as the paper does
    whole paths  one tree, grown on how often whole paths were right (what calibration does)
    confidence   a tree for every step, grown on the heads' probabilities, each head's at a fitted temperature
    fitted       a tree for every step, grown on a logistic model of a guess's log-probability, its rank and the head's
                 entropy, which knows the accuracies by rank as well as the confidence

All are walked step by step, as the engine would accept them (medusa/calibration.py).

Shapes: T positions of a reply, K heads, S guesses a head, V vocabulary, F features of a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.workload import encode, pick_prompts
from medusa import Engine, SamplingParams, TokenTree
from medusa.calibration import ReplyGuesses, grow_on, head_accuracy, tokens_per_step
from medusa.checkpoint import Checkpoint, load_checkpoint
from medusa.loops import cut_at_loop
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import grow, grow_in_order

WIDTH = 10
TEMPERATURES = torch.arange(0.5, 3.0, 0.1)


@dataclass(frozen=True)
class Judged:
    """A reply with the heads' guesses along it, what is known of each guess, and which are right. `known_TK` tells
    where the reply has a token for the head to guess."""

    guesses: ReplyGuesses
    logits_TKV: Tensor
    features_TKSF: Tensor
    right_TKS: Tensor
    known_TK: Tensor

    @classmethod
    def of(cls, backbone: Backbone, checkpoint: Checkpoint, prompt: list[int], reply: list[int]) -> Judged:
        hidden_Td = backbone.hidden_states(torch.tensor([prompt + reply], device=backbone.device))[0]
        made_on = hidden_Td[len(prompt) - 1 : len(prompt) + len(reply) - 1]
        with torch.no_grad():
            raw = checkpoint.heads.logits(made_on, backbone.lm_head_weight)
            logits_TKV = torch.stack([backbone.cap(head).float() for head in raw], 1).cpu()
        logprobs_TKV = logits_TKV.log_softmax(-1)
        top = logprobs_TKV.topk(WIDTH, dim=-1)
        token_ids = checkpoint.heads.token_map.cpu()[top.indices] if _truncated(checkpoint) else top.indices
        num_heads = checkpoint.config.num_heads
        future_TK = torch.tensor(
            [(reply[t + 1 : t + 1 + num_heads] + [-1] * num_heads)[:num_heads] for t in range(len(reply))]
        )
        rank_S = torch.arange(WIDTH).float().log1p()
        entropy_TK1 = -(logprobs_TKV.exp() * logprobs_TKV).sum(-1, keepdim=True)
        features = [top.values, rank_S.expand_as(top.values), entropy_TK1.expand_as(top.values)]
        return cls(
            guesses=ReplyGuesses(reply, token_ids.tolist()),
            logits_TKV=logits_TKV,
            features_TKSF=torch.stack([*features, torch.ones_like(top.values)], -1),
            right_TKS=token_ids == future_TK[..., None],
            known_TK=future_TK >= 0,
        )


Confidence = Callable[[Judged], Tensor]  # [T, K, S]: how likely each guess is right, where its parent is


def compare(
    *,
    prompts: Path,
    heads: Path,
    model: str,
    exclude: Path | None,
    num_prompts: int,
    max_tokens: int,
    temperatures: Sequence[float],
    sizes: Sequence[int],
) -> str:
    """The Markdown table."""
    backbone = Backbone.from_pretrained(model)
    checkpoint, tokenizer = load_checkpoint(heads, backbone), ChatTokenizer.from_pretrained(model)
    longest = backbone.max_positions - max_tokens
    questions = encode(pick_prompts(prompts, exclude, num_prompts), tokenizer, longest)
    asked = [question.prompt_ids for question in questions]
    engine = Engine(backbone, tokenizer, max_batch_size=32, speculation="off")
    lines = [f"| T | tree | {' | '.join(f'{size} nodes' for size in sizes)} |", f"|---|---|{'---|' * len(sizes)}"]
    for temperature in temperatures:
        params = [SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=i) for i in range(len(asked))]
        replies = [c.token_ids[: max(1, cut_at_loop(c.token_ids))] for c in engine.generate(asked, params)]
        judged = [Judged.of(backbone, checkpoint, ids, reply) for ids, reply in zip(asked, replies, strict=True)]
        for kind, values in measure(judged[::2], judged[1::2], sizes).items():
            lines.append(f"| {temperature:g} | {kind} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines)


def measure(seen: Sequence[Judged], unseen: Sequence[Judged], sizes: Sequence[int]) -> dict[str, list[float]]:
    """Tokens a step on `unseen` of every kind of tree fitted on `seen`, by size."""
    num_heads = seen[0].known_TK.shape[1]
    accuracy, _ = head_accuracy([item.guesses for item in seen], num_heads, WIDTH)
    paths, _ = grow_on([item.guesses for item in seen], accuracy, max(sizes))
    replies = [item.guesses for item in unseen]
    confidence, fitted = at_fitted_temperature(seen), by_fitted_model(seen)
    return {
        "accuracies": [tokens_per_step(replies, grow(accuracy, size)) for size in sizes],
        "whole paths": [tokens_per_step(replies, TokenTree.from_paths(paths[: size - 1])) for size in sizes],
        "confidence": [tokens_per_dynamic_step(unseen, confidence, size) for size in sizes],
        "fitted": [tokens_per_dynamic_step(unseen, fitted, size) for size in sizes],
    }


def tokens_per_dynamic_step(items: Sequence[Judged], confidence: Confidence, num_nodes: int) -> float:
    """Mean acceptance length where every step grows its own tree on the confidences at its root."""
    steps: list[int] = []
    for item in items:
        probability_TKS = confidence(item).tolist()
        root, length = 0, len(item.guesses.reply)
        while root < length - 1:
            heads = probability_TKS[root]
            growth = grow_in_order([WIDTH] * len(heads), lambda path, p=heads: p[len(path) - 1][path[-1]], num_nodes)
            nodes, path = {path for path, _ in growth}, ()
            for guesses, target in zip(item.guesses.guesses[root], item.guesses.reply[root + 1 :], strict=False):
                if target not in guesses or (*path, guesses.index(target)) not in nodes:
                    break
                path = (*path, guesses.index(target))
            steps.append(min(len(path) + 1, length - 1 - root))
            root += steps[-1]
    return sum(steps) / len(steps) if steps else 1.0


def at_fitted_temperature(seen: Sequence[Judged]) -> Confidence:
    """The heads' own probabilities, each head at the temperature under which the seen replies are most likely."""
    num_heads = seen[0].known_TK.shape[1]
    chosen = []
    for k in range(num_heads):
        logits = torch.cat([item.logits_TKV[:, k][item.known_TK[:, k]] for item in seen])
        top, right = logits.topk(WIDTH, -1), torch.cat([item.right_TKS[:, k][item.known_TK[:, k]] for item in seen])
        losses = [_hit_loss((logits / t).log_softmax(-1).gather(-1, top.indices).exp(), right) for t in TEMPERATURES]
        chosen.append(float(TEMPERATURES[int(torch.stack(losses).argmin())]))
    scale_K1 = torch.tensor(chosen)[:, None]

    def confidence(item: Judged) -> Tensor:
        top = item.logits_TKV.topk(WIDTH, -1)
        return (item.logits_TKV / scale_K1).log_softmax(-1).gather(-1, top.indices).exp()

    return confidence


def by_fitted_model(seen: Sequence[Judged]) -> Confidence:
    """A logistic regression a head over the features of its guesses."""
    weights = []
    for k in range(seen[0].known_TK.shape[1]):
        x = torch.cat([item.features_TKSF[:, k][item.known_TK[:, k]] for item in seen]).flatten(0, 1)
        y = torch.cat([item.right_TKS[:, k][item.known_TK[:, k]] for item in seen]).flatten().float()
        weights.append(_logistic(x, y))
    weights_KF = torch.stack(weights)
    return lambda item: torch.einsum("tksf,kf->tks", item.features_TKSF, weights_KF).sigmoid()


def _hit_loss(probability: Tensor, right: Tensor) -> Tensor:
    return functional.binary_cross_entropy(probability.clamp(1e-6, 1 - 1e-6), right.float())


def _logistic(x_NF: Tensor, y_N: Tensor) -> Tensor:
    weights_F = torch.zeros(x_NF.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_F], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(x_NF @ weights_F, y_N)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights_F.detach()


def _truncated(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.vocabulary == "truncated"
