"""A small Llama, and its heads, in a larger shape that computes the same function.

The result costs what a model of the large shape costs (weights, KV cache, arithmetic) and says what the small one
says, so that speed at 7B to 33B can be measured on real text with real acceptance and no such weights at hand.

How: *live* channels carry the small model. A weight that reads only dead channels is noise, so that no kernel sees a
matrix of zeros; a weight that would write into a dead channel of the residual stream is zero. RMSNorm is rescaled by
sqrt(d/D) and its epsilon by d/D. Rotary pair i of a head of size c moves to pair i * C/c of a head of size C, which
turns at the same frequency; queries are scaled by sqrt(C/c) to undo the softer softmax. Layers beyond the small
model's add nothing. Equal to the small model in exact arithmetic; in bfloat16 up to rounding.

Shapes: d, c, f the small model's hidden, head and feed-forward sizes; D, C, F the large one's.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from medusa.checkpoint import Checkpoint
from medusa.model import Backbone

NOISE = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama, in its configuration's own names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128


SHAPES = {
    "vicuna-7b": Shape(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "vicuna-13b": Shape(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "vicuna-33b": Shape(
        hidden_size=6656,
        intermediate_size=17920,
        num_hidden_layers=60,
        num_attention_heads=52,
        num_key_value_heads=52,
    ),
    "llama3-8b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "tiny-test": Shape(
        hidden_size=320,
        intermediate_size=768,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
}


def inflate(small: Backbone, shape_name: str, *, dtype: torch.dtype, device: str | torch.device) -> Backbone:
    """The backbone of that shape with the logits of `small`. Raises ValueError where it does not fit inside."""
    shape = _shape(shape_name)
    if not isinstance(small.model, LlamaForCausalLM):
        raise ValueError(f"{small.name} is a {small.config.model_type}; only Llama models can be inflated")
    model = inflate_model(small.model, shape, dtype=dtype, device=device)
    return Backbone(model, name=f"{small.name}@{shape_name}", digest=_digest(small.digest, shape_name))


def inflate_checkpoint(small: Checkpoint, big: Backbone) -> Checkpoint:
    """The heads with the same guesses on the hidden states of `big`, which was inflated from their backbone.

    A block's dead outputs stay zero: they read no live channel and have no bias, and SiLU(0) is 0.
    """
    config = replace(small.config, hidden_size=big.hidden_size)
    with torch.device("meta"):
        heads = type(small.heads)(config, _token_map(small))
    heads = heads.to(big.dtype).to_empty(device=big.device)
    live = torch.arange(small.config.hidden_size, device=big.device)
    generator = _generator(big.device)
    for k, head in enumerate(heads):
        of_small = list(small.heads[k])
        for layer, block in enumerate(list(head)[: config.num_layers]):
            source = of_small[layer].linear
            columns, scale = _block_inputs(source, live, big.hidden_size)
            _widen(block.linear.weight, source.weight * scale, live, columns, generator)
            block.linear.weight.data[len(live) :, columns] = 0
            block.linear.bias.data.zero_()
            block.linear.bias.data[: len(live)] = source.bias.to(block.linear.bias)
        if config.vocabulary != "shared":
            rows = torch.arange(config.head_vocab_size, device=big.device)
            _widen(head[-1].weight, of_small[-1].weight, rows, live, generator)
    if config.vocabulary == "truncated":
        heads.token_map.copy_(small.heads.token_map)
    name = big.name.partition("@")[2]
    if big.digest != _digest(small.meta.backbone.weights_digest, name):
        raise ValueError(f"{big.name} was not inflated from {small.meta.backbone.name}, to which these heads belong")
    ref = replace(small.meta.backbone, name=big.name, weights_digest=big.digest)
    meta = replace(small.meta, heads=config, backbone=ref)
    return Checkpoint(heads.eval().requires_grad_(False), meta)


def _block_inputs(source: nn.Linear, live: Tensor, large: int) -> tuple[Tensor, Tensor]:
    """Where a block's inputs lie in the large one's, and what undoes their growth. A Hydra head also reads embeddings,
    scaled to a root mean square of 1 over all channels, of which the dead ones are zero: sqrt(D/d) times as large."""
    num_inputs = source.in_features // len(live)
    columns = torch.cat([index * large + live for index in range(num_inputs)])
    scale = torch.full((num_inputs, len(live)), math.sqrt(len(live) / large), device=source.weight.device)
    scale[0] = 1  # the hidden state
    return columns, scale.flatten()


@torch.no_grad()
def inflate_model(
    small: LlamaForCausalLM, shape: Shape, *, dtype: torch.dtype, device: str | torch.device
) -> LlamaForCausalLM:
    """transformers' model of `shape` with the logits of `small`; the vocabulary is unchanged."""
    places = Places.of(small.config, shape, torch.device(device))
    big = _empty_model(_config(small.config, shape), dtype, torch.device(device))
    generator = _generator(torch.device(device))
    d, norm = small.config.hidden_size, math.sqrt(small.config.hidden_size / shape.hidden_size)
    big.model.embed_tokens.weight.zero_()
    big.model.embed_tokens.weight[:, :d] = small.model.embed_tokens.weight.to(big.model.embed_tokens.weight)
    _scale_norm(big.model.norm.weight, small.model.norm.weight, norm)
    rows = torch.arange(small.config.vocab_size, device=places.live.device)
    _widen(big.lm_head.weight, small.lm_head.weight, rows, places.live, generator)
    for index, layer in enumerate(big.model.layers):
        if index < small.config.num_hidden_layers:
            _fill_layer(layer, small.model.layers[index], places, norm, generator)
        else:
            _fill_idle_layer(layer, norm, generator)
    big.generation_config = small.generation_config
    return big.eval()


@dataclass(frozen=True)
class Places:
    """Which channels of the large shape carry the small model: of the residual stream, of queries, keys, values, what
    the output projection reads, and the feed-forward. `kv_source[i]` is the small head that the i-th one copies."""

    live: Tensor
    q_rows: Tensor
    k_rows: Tensor
    v_rows: Tensor
    o_columns: Tensor
    ffn: Tensor
    kv_source: tuple[int, ...]
    head_dim: int
    q_scale: float
    dead_q_rows: Tensor

    @classmethod
    def of(cls, small: LlamaConfig, shape: Shape, device: torch.device) -> Places:
        c, C = _head_dim(small), shape.head_dim
        _check_fits(small, shape)
        q_heads, kv_heads = _head_places(small, shape)
        pairs = torch.arange(c // 2, device=device) * (C // c)
        rotary = torch.cat([pairs, pairs + C // 2])  # where a head's channels go so that they turn as before
        plain = torch.arange(c, device=device)
        dead = torch.tensor(sorted(set(range(C)) - set(rotary.tolist())), dtype=torch.long, device=device)

        def rows(heads: list[int], within: Tensor) -> Tensor:
            return torch.cat([head * C + within for head in heads])

        kv_at = sorted(kv_heads)
        return cls(
            live=torch.arange(small.hidden_size, device=device),
            q_rows=rows(q_heads, rotary),
            k_rows=rows(kv_at, rotary),
            v_rows=rows(kv_at, plain),
            o_columns=rows(q_heads, plain),
            ffn=torch.arange(small.intermediate_size, device=device),
            kv_source=tuple(kv_heads[head] for head in kv_at),
            head_dim=c,
            q_scale=math.sqrt(C / c),
            dead_q_rows=rows(q_heads, dead),
        )

    def kv_rows(self, weight: Tensor) -> Tensor:
        """A small key or value projection's rows, in the order of the heads that copy them."""
        c = self.head_dim
        return torch.cat([weight[source * c : (source + 1) * c] for source in self.kv_source])


def _head_places(small: LlamaConfig, shape: Shape) -> tuple[list[int], dict[int, int]]:
    """Where each small query head goes, and which small key-value head each used large one copies."""
    h, g = small.num_attention_heads, small.num_key_value_heads
    H, G = shape.num_attention_heads, shape.num_key_value_heads
    group, large_group = h // g, H // G
    if large_group >= group and g <= G:
        return [kv * large_group + q for kv in range(g) for q in range(group)], {kv: kv for kv in range(g)}
    if large_group == 1 and h <= H:
        return list(range(h)), {q: q // group for q in range(h)}
    raise ValueError(f"{h} heads over {g} key-value heads have no place in {H} over {G}")


def _check_fits(small: LlamaConfig, shape: Shape) -> None:
    has = {**asdict(shape)}
    needs = {name: _head_dim(small) if name == "head_dim" else getattr(small, name) for name in has}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
        if has[name] < needs[name]:
            raise ValueError(f"{name} {needs[name]} of the small model does not fit the shape's {has[name]}")
    if shape.head_dim % _head_dim(small):
        raise ValueError(f"the shape's head_dim {shape.head_dim} is no multiple of the model's {_head_dim(small)}")


def _fill_layer(layer: nn.Module, source: nn.Module, places: Places, norm: float, generator: torch.Generator) -> None:
    attention, mlp, live = layer.self_attn, layer.mlp, places.live
    small, small_mlp = source.self_attn, source.mlp
    _scale_norm(layer.input_layernorm.weight, source.input_layernorm.weight, norm)
    _scale_norm(layer.post_attention_layernorm.weight, source.post_attention_layernorm.weight, norm)
    scaled_q = small.q_proj.weight.float() * places.q_scale
    _widen(attention.q_proj.weight, scaled_q, places.q_rows, live, generator)
    # Inside a live head the added channels of queries and keys must not meet.
    attention.q_proj.weight[places.dead_q_rows] = 0
    _widen(attention.k_proj.weight, places.kv_rows(small.k_proj.weight), places.k_rows, live, generator)
    _widen(attention.v_proj.weight, places.kv_rows(small.v_proj.weight), places.v_rows, live, generator)
    _place(attention.o_proj.weight, small.o_proj.weight, live, places.o_columns)
    _widen(mlp.gate_proj.weight, small_mlp.gate_proj.weight, places.ffn, live, generator)
    _widen(mlp.up_proj.weight, small_mlp.up_proj.weight, places.ffn, live, generator)
    _place(mlp.down_proj.weight, small_mlp.down_proj.weight, live, places.ffn)


def _fill_idle_layer(layer: nn.Module, norm: float, generator: torch.Generator) -> None:
    """Works like any other and adds zero."""
    attention, mlp = layer.self_attn, layer.mlp
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        linear.weight.normal_(0, NOISE, generator=generator)
    attention.o_proj.weight.zero_()
    mlp.down_proj.weight.zero_()
    layer.input_layernorm.weight.fill_(norm)
    layer.post_attention_layernorm.weight.fill_(norm)


def _widen(big: Tensor, small: Tensor, rows: Tensor, columns: Tensor, generator: torch.Generator) -> None:
    """`small` at big[rows, columns], noise elsewhere."""
    big.data.normal_(0, NOISE, generator=generator)
    big.data[rows[:, None], columns[None, :]] = small.detach().to(big)


def _place(big: Tensor, small: Tensor, rows: Tensor, columns: Tensor) -> None:
    """`small` at big[rows, columns], zero elsewhere: what writes to the residual stream."""
    big.data.zero_()
    big.data[rows[:, None], columns[None, :]] = small.detach().to(big)


def _scale_norm(big: Tensor, small: Tensor, norm: float) -> None:
    big.data.fill_(norm)
    big.data[: len(small)] = (small.detach().to(big.device).float() * norm).to(big.dtype)


def _config(small: LlamaConfig, shape: Shape) -> LlamaConfig:
    rope = getattr(small, "rope_parameters", None)
    return LlamaConfig(
        **asdict(shape),
        **({"rope_parameters": dict(rope)} if rope else {}),
        vocab_size=small.vocab_size,
        max_position_embeddings=small.max_position_embeddings,
        rms_norm_eps=small.rms_norm_eps * small.hidden_size / shape.hidden_size,
        tie_word_embeddings=False,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        pad_token_id=small.pad_token_id,
        attn_implementation="sdpa",
    )


def _empty_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to_empty(device=device)
        with torch.device(device):  # its table is a buffer that to_empty leaves unset
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
    finally:
        torch.set_default_dtype(default)
    return model


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _head_dim(config: LlamaConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _token_map(checkpoint: Checkpoint) -> Tensor | None:
    return checkpoint.heads.token_map.cpu() if checkpoint.config.vocabulary == "truncated" else None


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def _digest(small: str, shape_name: str) -> str:
    return f"inflated:{shape_name}:{small}"
