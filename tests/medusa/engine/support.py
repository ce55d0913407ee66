"""What the engine's tests share: engines over tiny backbones, Hugging Face as the reference, heads that guess right.

Untrained heads hardly ever guess right, so an `Oracle` stands in for them: it knows the replies to come and puts the
true token at a random rank, seven times in ten. What it must not do is change a reply.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from medusa import Engine, HeadsConfig, MedusaHeads, SamplingParams, TokenTree
from medusa.checkpoint import BackboneRef, Calibration, Checkpoint, CheckpointMeta
from medusa.engine.engine import Prompt
from medusa.engine.kv_cache import PAGE_SIZE
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import grow

NUM_HEADS = 4
ACCURACY = [[0.5 / (k + 1), 0.24 / (k + 1), 0.12 / (k + 1), 0.06 / (k + 1)] for k in range(NUM_HEADS)]
SIZES = (1, 2, 4, 8, 16, 32, 64)
TREES = {size: grow(ACCURACY, size) for size in SIZES}


class Oracle:
    """`heads.guess` for an engine whose replies are known: it finds out by the hidden state where in them a row is.

    Head k's true token is among the guesses with probability `rate`, at one of the first three ranks.
    """

    def __init__(self, engine: Engine, texts: Sequence[Sequence[int]], *, rate: float = 0.7, seed: int = 0) -> None:
        rng = random.Random(seed)
        hidden, guesses = [], []
        for text in texts:
            hidden.append(engine.backbone.hidden_states(torch.tensor([list(text)]))[0])
            guesses += [self._guesses(rng, text, i, rate, engine.backbone.vocab_size) for i in range(len(text))]
        self._hidden = torch.cat(hidden)
        self._guesses_PKS = torch.tensor(guesses)
        self.calls = 0

    @staticmethod
    def _guesses(rng: random.Random, text: Sequence[int], i: int, rate: float, vocab_size: int) -> list[list[int]]:
        """Head k guesses text[i + k + 2] from the hidden state of text[i]."""
        heads = []
        for k in range(NUM_HEADS):
            wrong = rng.sample(range(vocab_size), 11)
            if i + k + 2 < len(text) and rng.random() < rate:
                truth = text[i + k + 2]
                wrong = [token for token in wrong if token != truth]
                wrong.insert(rng.randrange(3), truth)
            heads.append(wrong[:10])
        return heads

    def guess(
        self, hidden_Bd: torch.Tensor, weight: torch.Tensor, width: int, cap: Any, num_heads: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        nearest = torch.cdist(hidden_Bd.double(), self._hidden.double()).argmin(-1)
        guesses = self._guesses_PKS[nearest][:, :num_heads, :width]
        return guesses, torch.zeros(guesses.shape)


class Choosing:
    """A Speculation whose trees are `choose(sequences)`, and which learns nothing."""

    def __init__(self, choose: Callable[[Sequence[Any]], list[TokenTree]]) -> None:
        self.trees_of = choose

    def learn(self, sequence: Any, tree: TokenTree, num_tokens: int) -> None:
        pass


@cache
def load(path: Path) -> tuple[Backbone, ChatTokenizer]:
    return Backbone.from_pretrained(path, device="cpu"), ChatTokenizer.from_pretrained(path)


@cache
def load_reference(path: Path) -> Any:
    """transformers' own model; its "sdpa" would drop Gemma 2's soft-cap on scores without a word."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def checkpoint_of(backbone: Backbone, *, trees: Sequence[TokenTree] = (), vocabulary: str = "shared") -> Checkpoint:
    """Untrained heads; with `trees`, a calibration as if ACCURACY had been measured."""
    config = HeadsConfig(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=NUM_HEADS,
        vocabulary=vocabulary,
        truncated_vocab_size=backbone.vocab_size // 2 if vocabulary == "truncated" else None,
    )
    token_map = torch.arange(0, backbone.vocab_size, 2) if vocabulary == "truncated" else None
    calibration = Calibration(accuracy=ACCURACY, num_positions=1000) if trees else None
    meta = CheckpointMeta(
        heads=config,
        backbone=BackboneRef(name=backbone.name, weights_digest=backbone.digest),
        calibration=calibration,
        trees=[tree.to_list() for tree in trees],
    )
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight, token_map)
    return Checkpoint(heads.eval().requires_grad_(False), meta)


def build_engine(
    path: Path, *, trees: Sequence[TokenTree] = (), vocabulary: str = "shared", heads: bool = True, **arguments: Any
) -> Engine:
    """An engine on the CPU in float32, plain until it is told otherwise."""
    backbone, tokenizer = load(path)
    checkpoint = checkpoint_of(backbone, trees=trees, vocabulary=vocabulary) if heads else None
    return Engine(backbone, tokenizer, checkpoint, **{"speculation": "off", "max_batch_size": 4, **arguments})


def gigabytes(path: Path, pages: int) -> float:
    """What `kv_cache_gb` gives a cache of so many pages (one more is the trash page)."""
    backbone, _ = load(path)
    heads, size = backbone.kv_shape
    return (pages + 1.5) * (2 * backbone.num_layers * PAGE_SIZE * heads * size * 4) / 2**30


def install_oracle(engine: Engine, texts: Sequence[Sequence[int]], **arguments: Any) -> Oracle:
    assert engine.checkpoint is not None
    oracle = Oracle(engine, texts, **arguments)
    engine.checkpoint.heads.guess = oracle.guess
    return oracle


def hugging_face(
    path: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, **arguments: Any
) -> list[list[int]]:
    """The tokens of transformers' own greedy `generate`, one prompt at a time."""
    model = load_reference(path)
    replies = []
    for prompt in prompts:
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0, **arguments}
        ids = torch.tensor([list(prompt)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        replies.append(output[0, len(prompt) :].tolist())
    return replies


def random_prompts(lengths: Sequence[int], *, vocab: int = 500, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, vocab) for _ in range(length)] for length in lengths]


class Prepared:
    """An engine, prompts, their plain replies under `params`, and an oracle that knows them."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], params: Any, **oracle: Any) -> None:
        self.engine, self.prompts, self.params = engine, prompts, params
        engine.set_tree(None)
        self.plain = engine.generate(prompts, params)
        texts = [[*c.prompt_token_ids, *c.token_ids] for c in self.plain]
        self.oracle = install_oracle(engine, texts, **oracle)

    def decode(self, tree: TokenTree, params: Any = None) -> list[Any]:
        self.engine.set_tree(tree)
        return self.engine.generate(self.prompts, params or self.params)


def greedy(**arguments: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **arguments})


def _is_alive(pid: int) -> bool:
    """A process that has ended and waits to be collected counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: Sequence[int], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(_is_alive, pids))
