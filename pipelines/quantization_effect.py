"""What quantising a backbone changes: its weights, what it would say next, and what it says.

The original answers the prompts twice, sampled and greedily. On every position of the sampled replies both models' next
token distributions are compared (the text is the original's, so that each position is compared on equal terms); the
greedy replies are compared as they were decoded, where one difference changes all that follows. Both models are in
memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from rich.console import Console

from medusa import Engine, SamplingParams
from medusa.config import strict
from medusa.model import Backbone
from medusa.quantization import Quantization, check_device, dequantize
from medusa.quantized_linear import QuantizedLinear
from medusa.tokenizer import ChatTokenizer
from pipelines.answering import reply_seed
from pipelines.progress import track
from pipelines.prompt_files import PromptError, read_prompts

if TYPE_CHECKING:
    from pipelines.run import ModelConfig

BATCH = 16  # replies decoded at once


@strict
@dataclass(frozen=True, kw_only=True)
class EffectConfig:
    """Replies of `max_tokens` to the first turns of the file's first `limit` prompts that fit the context beside them.

    At temperature 1 KL and perplexity are the model's own, at lower ones those of the text that it is likely to write.
    """

    kinds: list[Quantization] = field(default_factory=lambda: list(get_args(Quantization)))
    limit: int = 64
    max_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(get_args(Quantization))
        if unknown or not self.kinds:
            raise ValueError(f"kinds are one or more of {list(get_args(Quantization))}, got {self.kinds}")
        if self.limit < 1 or self.max_tokens < 1:
            raise ValueError(f"limit and max_tokens must be at least 1, got {self.limit} and {self.max_tokens}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; greedy replies are compared as well"
            )


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One quantisation beside the original. Errors are Frobenius norms of the difference over those of the weight;
    `kl` is the mean of KL(original || quantised) in nats a token; shares are from 0 to 1."""

    quantization: Quantization
    weight_bytes: int
    weight_error: float
    worst_weight_error: float
    worst_layer: str
    kl: float
    kl_p99: float
    perplexity: float
    same_best: float
    same_greedy_tokens: float
    same_greedy_replies: float


@dataclass(frozen=True, kw_only=True)
class EffectReport:
    """`perplexity` is the original's, `weight_bytes` those of its layers that are quantised."""

    model: str
    dtype: str
    device: str
    prompts: int
    positions: int
    weight_bytes: int
    perplexity: float
    config: EffectConfig
    effects: list[Effect]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Text:
    prompt_ids: list[int]
    reply_ids: list[int]


def measure_effects(model: ModelConfig, prompts: Path, config: EffectConfig, console: Console) -> EffectReport:
    """Raises PromptError where no prompt fits, and QuantizationError where model or device take no such weights."""
    original = model.load()
    for kind in config.kinds:
        check_device(kind, original.device)
    tokenizer = ChatTokenizer.from_pretrained(model.backbone)
    encoded = _encode(prompts, tokenizer, original.max_positions - config.max_tokens)[: config.limit]
    if not encoded:
        raise PromptError(f"no prompt of {prompts} fits a context of {original.max_positions} beside the reply")
    sampled = _answer(original, tokenizer, encoded, config, config.temperature)
    greedy = _answer(original, tokenizer, encoded, config, 0.0)
    effects, perplexity = [], math.nan
    for kind in config.kinds:
        quantized = model.load(kind)
        compared = _compare(original, quantized, sampled, console)
        perplexity = compared.pop("original_perplexity")
        effects.append(
            Effect(
                quantization=kind,
                **_weight_errors(original, quantized),
                **compared,
                **_same_greedy(greedy, _answer(quantized, tokenizer, encoded, config, 0.0)),
            )
        )
    return EffectReport(
        model=original.name,
        dtype=str(original.dtype).removeprefix("torch."),
        device=str(original.device),
        prompts=len(encoded),
        positions=sum(len(text.reply_ids) for text in sampled),
        weight_bytes=sum(weight.nbytes for weight, _ in _pairs(original, quantized).values()),
        perplexity=perplexity,
        config=config,
        effects=effects,
    )


def _encode(path: Path, tokenizer: ChatTokenizer, longest: int) -> list[list[int]]:
    """First turns only: a later turn depends on the reply before it."""
    encoded = []
    for prompt in read_prompts(path)[0]:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt.turns[0]}])
        if len(ids) <= longest:
            encoded.append(ids)
    return encoded


def _answer(
    backbone: Backbone, tokenizer: ChatTokenizer, prompts: Sequence[list[int]], config: EffectConfig, temperature: float
) -> list[Text]:
    longest = max(map(len, prompts)) + config.max_tokens
    engine = Engine(
        backbone, tokenizer, max_batch_size=min(BATCH, len(prompts)), max_model_len=longest, speculation="off"
    )
    params = [
        SamplingParams(temperature=temperature, max_tokens=config.max_tokens, seed=reply_seed(config.seed, str(i), 0))
        for i in range(len(prompts))
    ]
    replies = engine.generate(prompts, params)
    return [Text(prompt, reply.token_ids) for prompt, reply in zip(prompts, replies, strict=True)]


def _compare(original: Backbone, quantized: Backbone, texts: Sequence[Text], console: Console) -> dict[str, float]:
    """Both models' distributions over every next token of the replies."""
    kl, losses, original_losses, same = [], [], [], []
    for text in track(texts, "comparing", len(texts), console):
        before, after = _log_probabilities(original, text), _log_probabilities(quantized, text)
        chosen = torch.tensor(text.reply_ids, device=before.device)[:, None]
        kl.append((before.exp() * (before - after)).sum(-1))
        original_losses.append(-before.gather(1, chosen)[:, 0])
        losses.append(-after.gather(1, chosen)[:, 0])
        same.append(before.argmax(-1) == after.argmax(-1))
    every_kl = torch.cat(kl)
    return {
        "kl": every_kl.mean().item(),
        "kl_p99": every_kl.quantile(0.99).item(),
        "perplexity": torch.cat(losses).mean().exp().item(),
        "original_perplexity": torch.cat(original_losses).mean().exp().item(),
        "same_best": torch.cat(same).double().mean().item(),
    }


def _log_probabilities(backbone: Backbone, text: Text) -> torch.Tensor:
    """Of every next token at each position that a reply token was drawn from, in float64."""
    ids = torch.tensor([[*text.prompt_ids, *text.reply_ids]], device=backbone.device)
    hidden = backbone.hidden_states(ids)[0, len(text.prompt_ids) - 1 : -1]
    with torch.no_grad():
        return backbone.logits(hidden).double().log_softmax(-1)


def _pairs(original: Backbone, quantized: Backbone) -> dict[str, tuple[torch.Tensor, QuantizedLinear]]:
    """The weights before and after, by layer."""
    decoder = original.model.base_model
    return {
        name: (decoder.get_submodule(name).weight, layer)
        for name, layer in quantized.model.base_model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def _weight_errors(original: Backbone, quantized: Backbone) -> dict[str, Any]:
    squares = {}
    num_bytes = 0
    for name, (weight, layer) in _pairs(original, quantized).items():
        whole = weight.double()
        difference = dequantize(layer.quantized).double() - whole
        squares[name] = (difference.square().sum().item(), whole.square().sum().item())
        num_bytes += layer.quantized.nbytes
    worst = max(squares, key=lambda name: squares[name][0] / squares[name][1])
    errors, sizes = zip(*squares.values(), strict=True)
    return {
        "weight_bytes": num_bytes,
        "weight_error": math.sqrt(sum(errors) / sum(sizes)),
        "worst_weight_error": math.sqrt(squares[worst][0] / squares[worst][1]),
        "worst_layer": worst,
    }


def _same_greedy(before: Sequence[Text], after: Sequence[Text]) -> dict[str, float]:
    """The share of the original's greedy tokens before the first difference, and of replies without any."""
    same = [_common(a.reply_ids, b.reply_ids) for a, b in zip(before, after, strict=True)]
    equal = [a.reply_ids == b.reply_ids for a, b in zip(before, after, strict=True)]
    return {
        "same_greedy_tokens": sum(same) / sum(len(text.reply_ids) for text in before),
        "same_greedy_replies": sum(equal) / len(equal),
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
