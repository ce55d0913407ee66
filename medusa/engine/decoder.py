"""The decoder of a GPU step: a list of nodes in, their hidden states out, in launches that a CUDA graph can hold.

`FusedDecoder` runs the Llama family (RMSNorm, rotary attention, gated MLP) by this project's own kernels, seven
launches a layer or a few more. `ModuleDecoder` runs any other supported model through transformers' modules with tree
attention over pages inside; it is also the plain twin that tests hold the fused one against.

Shapes: M nodes, d hidden size, H query heads, G key-value heads, D head size, F channels of the MLP, S partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from medusa.kernels.attention import attend
from medusa.kernels.attention_plan import AttentionPlan, Rotation, Scratch, Visible
from medusa.kernels.gate import silu_mul
from medusa.kernels.launch import supports_pdl
from medusa.kernels.matmul import gated, product, rows_for_product
from medusa.kernels.norm import add_norm
from medusa.kernels.rope import rope_write
from medusa.kernels.tiles import RingTiles, Tiles, Weight, plan_gated_of, plan_of, starts_early
from medusa.model import Backbone
from medusa.quantization import QuantizedWeight
from medusa.quantized_linear import QuantizedLinear

FUSED_KINDS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class StepNodes:
    """One step's nodes: token, position for RoPE, batch row, index within its tree; and what they may look at."""

    token_M: torch.Tensor
    position_M: torch.Tensor
    row_M: torch.Tensor
    node_M: torch.Tensor
    visible: Visible
    plan: AttentionPlan


class Decoder(Protocol):
    """Writes the nodes' keys and values into the cache and returns what the LM head reads, [M, d]."""

    def __call__(self, nodes: StepNodes) -> torch.Tensor: ...


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights as the kernels read them; the model's own parameters become views of them."""

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    out: Weight
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Weight
    down: Weight
    window: int | None
    scaling: float


@dataclass(frozen=True)
class Buffers:
    """What the launches of one step size hand each other."""

    residual_Md: torch.Tensor
    normed_Md: torch.Tensor
    qkv_MHD: torch.Tensor
    attended_MHD: torch.Tensor
    out_SMd: torch.Tensor
    both_M2F: torch.Tensor
    gated_MF: torch.Tensor
    down_SMd: torch.Tensor


def can_fuse(backbone: Backbone) -> bool:
    """Whether the model is one whose forward `FusedDecoder` writes out."""
    config = backbone.config
    return (
        config.model_type in FUSED_KINDS
        and getattr(config, "hidden_act", None) == "silu"
        and not getattr(config, "mlp_bias", False)
    )


class FusedDecoder:
    """Llama-like layers over `cache` [layers, 2, pages, page size, G, D], for positions below `max_positions`.

    Of a quantised backbone its linear layers are, and they are nearly all the bytes of a step. The embedding is read a
    row a token; norms are vectors; the LM head gives the logits that decide, and the heads, which often share it, were
    trained on it: these stay in the model's dtype.
    """

    def __init__(self, backbone: Backbone, cache: torch.Tensor, scratch: Scratch, max_positions: int) -> None:
        model = backbone.model.base_model
        self._rank = backbone.rank
        self._cache, self._scratch = cache, scratch
        self._layers = [fuse(layer) for layer in model.layers]
        self._embedding = model.embed_tokens.weight
        self._norm, self._eps = model.norm.weight, model.norm.variance_epsilon
        self._cos, self._sin = _angles(model.rotary_emb, max_positions, cache)
        self._buffers: dict[int, Buffers] = {}
        self.pdl = supports_pdl(cache.device)

    @property
    def is_plain(self) -> bool:
        """Whether attention itself rotates and writes in all layers, and sees all of a sequence."""
        return all(layer.window is None and layer.head_norms is None for layer in self._layers)

    def __call__(self, nodes: StepNodes) -> torch.Tensor:
        is_chain = nodes.visible.bits_RNW is None
        # Those of prompts go back to the allocator, or to their graphs' pool: chunks of many sizes would add up.
        buffers = (self._new_buffers if is_chain else self._buffers_of)(len(nodes.token_M))
        torch.index_select(self._embedding, 0, nodes.token_M, out=buffers.residual_Md)
        add_norm(None, buffers.residual_Md, self._layers[0].input_norm, self._eps, buffers.normed_Md)
        for index, layer in enumerate(self._layers):
            self._attention(self._cache[index], layer, nodes, buffers)
            self._mlp(layer, buffers)
            self._norm_after(index, buffers)
        return buffers.normed_Md

    def _attention(self, cache: torch.Tensor, layer: Layer, nodes: StepNodes, buffers: Buffers) -> None:
        product(buffers.normed_Md, layer.qkv, buffers.qkv_MHD.flatten(1), layer.qkv_bias, pdl=self.pdl)
        self._attend(cache, layer, nodes, buffers)
        product(buffers.attended_MHD.flatten(1), layer.out, buffers.out_SMd, pdl=self.pdl)
        next_tiles = plan_gated_of(len(buffers.normed_Md), layer.gate_up, buffers.normed_Md.dtype)
        self._add_norm(buffers.out_SMd, layer.mlp_norm, buffers, next_tiles, layer.out_bias)

    def _attend(self, cache: torch.Tensor, layer: Layer, nodes: StepNodes, buffers: Buffers) -> None:
        """A step's attention rotates and writes by itself. For a prompt's chains, and where heads are normalised
        before, that is a launch of its own."""
        visible, heads = nodes.visible, buffers.attended_MHD.shape[1]
        if visible.bits_RNW is not None and layer.head_norms is None:
            query_MHD = buffers.qkv_MHD
            rotation = Rotation(nodes.position_M, self._cos, self._sin)
        else:
            query_MHD, rotation = buffers.qkv_MHD[:, :heads], None
            rope_write(
                buffers.qkv_MHD, cache, visible.tables_RP, visible.length_R, nodes.row_M, nodes.node_M,
                nodes.position_M, self._cos, self._sin, layer.head_norms, pdl=self.pdl,
            )  # fmt: skip
        attend(
            query_MHD, cache, visible, nodes.plan, buffers.attended_MHD, self._scratch, layer.scaling,
            rotation=rotation, window=layer.window, pdl=self.pdl,
        )  # fmt: skip

    def _mlp(self, layer: Layer, buffers: Buffers) -> None:
        tiles = plan_gated_of(len(buffers.normed_Md), layer.gate_up, buffers.normed_Md.dtype)
        if tiles is None:
            if isinstance(layer.gate_up, QuantizedWeight):
                product(buffers.normed_Md, layer.gate_up, buffers.both_M2F, pdl=self.pdl)
            else:
                torch.mm(buffers.normed_Md, layer.gate_up.t(), out=buffers.both_M2F)
            silu_mul(buffers.both_M2F, buffers.gated_MF, pdl=self.pdl)
        else:
            gated(buffers.normed_Md, layer.gate_up, buffers.gated_MF, tiles, pdl=self.pdl)
        product(buffers.gated_MF, layer.down, buffers.down_SMd, pdl=self.pdl)

    def _norm_after(self, index: int, buffers: Buffers) -> None:
        """The next layer's input norm, or after the last layer the one that the LM head's rows come from."""
        if index + 1 == len(self._layers):
            self._add_norm(buffers.down_SMd, self._norm, buffers, None)
        else:
            following = self._layers[index + 1]
            next_tiles = plan_of(len(buffers.normed_Md), following.qkv, buffers.normed_Md.dtype, may_split=False)
            self._add_norm(buffers.down_SMd, following.input_norm, buffers, next_tiles)

    def _add_norm(
        self,
        partial_SMd: torch.Tensor,
        weight_d: torch.Tensor,
        buffers: Buffers,
        next_tiles: Tiles | RingTiles | None,
        bias_d: torch.Tensor | None = None,
    ) -> None:
        """`next_tiles`: of the product that is launched next; None: the library's, or something else."""
        pdl = self.pdl and self._rank is None
        add_norm(
            self._summed(partial_SMd), buffers.residual_Md, weight_d, self._eps, buffers.normed_Md, bias_d,
            pdl=pdl, early=pdl and starts_early(len(buffers.normed_Md), next_tiles),
        )  # fmt: skip

    def _summed(self, partial_SMd: torch.Tensor) -> torch.Tensor:
        """Over the processes that share the layers; what a single one found is the sum already."""
        if self._rank is None:
            return partial_SMd
        own_1Md = partial_SMd if len(partial_SMd) == 1 else partial_SMd.sum(0, keepdim=True)
        self._rank.sum(own_1Md)
        return own_1Md

    def _buffers_of(self, num_nodes: int) -> Buffers:
        if num_nodes not in self._buffers:
            self._buffers[num_nodes] = self._new_buffers(num_nodes)
        return self._buffers[num_nodes]

    def _new_buffers(self, num_nodes: int) -> Buffers:
        layer, size = self._layers[0], self._embedding.shape[1]
        head_size = self._cache.shape[-1]

        def empty(*shape: int, dtype: torch.dtype = self._embedding.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=self._cache.device)

        def partial(weight: Weight) -> torch.Tensor:
            tiles = plan_of(num_nodes, weight, self._embedding.dtype, may_split=True)
            splits = tiles.splits if tiles else 1
            return empty(splits, num_nodes, size, dtype=torch.float32 if splits > 1 else self._embedding.dtype)

        return Buffers(
            residual_Md=empty(num_nodes, size),
            normed_Md=rows_for_product(num_nodes, size, like=self._embedding),
            qkv_MHD=empty(num_nodes, layer.qkv.shape[0] // head_size, head_size),
            # Rows that belong to no sequence are not written, and what is uninitialised could be NaN.
            attended_MHD=rows_for_product(
                num_nodes, layer.out.shape[1] // head_size, head_size, like=self._embedding
            ).zero_(),
            out_SMd=partial(layer.out),
            both_M2F=empty(num_nodes, layer.gate_up.shape[0]),
            gated_MF=rows_for_product(num_nodes, layer.down.shape[1], like=self._embedding),
            down_SMd=partial(layer.down),
        )


def fuse(layer: Any) -> Layer:
    """Lays Q, K and V, and gate and up, out as one matrix each, and makes the modules' parameters views of them."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_joined_weights(projections),
        qkv_bias=None if attention.q_proj.bias is None else _joined([linear.bias for linear in projections]),
        head_norms=norms,
        out=_weight(attention.o_proj),
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_joined_weights([mlp.gate_proj, mlp.up_proj]),
        down=_weight(mlp.down_proj),
        # Mistral's attention reads the window from its configuration, Qwen's decides by layer.
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
        scaling=attention.scaling,
    )


def _weight(linear: torch.nn.Linear | QuantizedLinear) -> Weight:
    return linear.quantized if isinstance(linear, QuantizedLinear) else linear.weight


def _joined_weights(linears: list[Any]) -> Weight:
    if not isinstance(linears[0], QuantizedLinear):
        return _joined([linear.weight for linear in linears])
    parts = [linear.quantized for linear in linears]
    values, scale = _adjoining([part.values for part in parts]), _adjoining([part.scale for part in parts])
    if values is not None and scale is not None:
        return QuantizedWeight(values, scale)
    whole = QuantizedWeight.joined(parts)
    sizes = [linear.out_features for linear in linears]
    for linear, values, scale in zip(linears, whole.values.split(sizes), whole.scale.split(sizes), strict=True):
        linear.quantized = QuantizedWeight(values, scale)
    return whole


def _joined(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    if (whole := _adjoining([parameter.data for parameter in parameters])) is not None:
        return whole
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return whole


def _adjoining(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The parts as one tensor, where an engine before this one has laid them out so: there may be no room for both."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.nbytes
    if end - first.data_ptr() + first.storage_offset() * first.itemsize > first.untyped_storage().nbytes():
        return None  # neighbours by chance
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _angles(rotary: Any, max_positions: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, half a head each, by the model's own rotary embedding."""
    positions = torch.arange(max_positions, device=like.device)[None]
    cos, sin = rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


class PagedNodes:
    """What a transformers forward over flat nodes sends its layers' queries, keys and values to."""

    def __init__(self, cache: torch.Tensor, nodes: StepNodes, scratch: Scratch) -> None:
        self._cache, self._nodes, self._scratch = cache, nodes, scratch

    def attend(
        self,
        layer: int,
        query_BHND: torch.Tensor,
        key_BHND: torch.Tensor,
        value_BHND: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """The batch dimension is 1 and N are all nodes of the step: [1, M, H, D]."""
        nodes, visible = self._nodes, self._nodes.visible
        qkv_MHD = torch.cat([query_BHND, key_BHND, value_BHND], 1)[0].transpose(0, 1).contiguous()
        rope_write(qkv_MHD, self._cache[layer], visible.tables_RP, visible.length_R, nodes.row_M, nodes.node_M)
        query_MHD = qkv_MHD[:, : query_BHND.shape[1]]
        out_MHD = torch.zeros_like(query_MHD)
        attend(
            query_MHD, self._cache[layer], visible, nodes.plan, out_MHD, self._scratch, scaling,
            window=sliding_window, softcap=softcap,
        )  # fmt: skip
        return out_MHD[None]


class ModuleDecoder:
    """Any supported model, by transformers' own modules."""

    def __init__(self, backbone: Backbone, cache: torch.Tensor, scratch: Scratch) -> None:
        self._backbone, self._cache, self._scratch = backbone, cache, scratch

    def __call__(self, nodes: StepNodes) -> torch.Tensor:
        paged = PagedNodes(self._cache, nodes, self._scratch)
        return self._backbone.tree_hidden_states(nodes.token_M[None], nodes.position_M[None], paged)[0]
