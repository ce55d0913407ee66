"""The backbone: any Hugging Face decoder, run plainly or over token trees, with no copied modelling code.

Attention functions are registered with transformers (medusa/attention.py): a forward that carries a `tree` keyword
sends each layer's query, key and value to that tree's `attend`, which writes them to the engine's KV cache and looks
along ancestors; everything else of the model (projections, RoPE, norms, MLPs) is transformers' own. What such a forward
cannot carry is refused by name: from the configuration before any weights are read, and by one small forward after.

Shapes: B sequences, T tokens or N tree nodes a sequence, H heads, D head size, d hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from medusa.attention import PACKED_ATTENTION, TREE_ATTENTION, PackedRows, TreeAttention, UnsupportedModelError
from medusa.parallel import Rank, load_share
from medusa.quantization import Quantization, QuantizationError
from medusa.quantized_linear import quantize_linears
from medusa.weights import Hashing, model_directory, weights_digest

# RoPE kinds whose angles depend only on a token's own position. "dynamic" rescales all of them as a sequence grows.
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
LAYER_TYPES = {"full_attention", "sliding_attention"}


class Backbone:
    """A frozen decoder with its LM head.

    Build with `from_pretrained`, or around a transformers model in memory (`name` and `digest` are then the caller's).
    """

    def __init__(self, model: PreTrainedModel, *, name: str, digest: str | None = None) -> None:
        check_supported(model.config, type(model))
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._digest = digest
        self._directory: Path | None = None
        self.hashing: Hashing | None = None
        self.quantization: Quantization | None = None
        self.rank: Rank | None = None  # where the weights are one process's share
        # Query heads, and (key-value heads, head size), of every layer; of a share, its own.
        self.num_query_heads, self.kv_shape = self._see_through()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantization: Quantization | None = None,
        rank: Rank | None = None,
        hashing: Hashing | None = None,
    ) -> Self:
        """Loads a model folder or hub id from safetensors. Default device: a GPU if there is one.

        Default dtype: float32 on a CPU, the checkpoint's own on a GPU. With `quantization` a GPU never holds the whole
        weights (see `quantize`). With a `rank` it loads that process's share, on its device, as all of its group do at
        once. `hashing` is the digest of the same folder, already under way; without it `digest` hashes when it is asked
        for. Raises UnsupportedModelError, ShardingError, QuantizationError, or OSError when nothing is there.
        """
        directory = model_directory(name, revision)
        if hashing is not None and hashing.directory.resolve() != directory.resolve():
            raise ValueError(f"hashing is of {hashing.directory}, but the weights to be loaded are in {directory}")
        device = rank.device if rank else default_device(device)
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        config = AutoConfig.from_pretrained(directory)
        check_supported(config)
        attention = _plain_attention(config)
        if rank is not None:
            model = load_share(directory, config, rank, dtype=dtype or "auto", attention=attention)
            rank.meet()
        else:
            # Each tensor goes to its device as it is read, not by way of a whole model in main memory.
            placed = torch.device("cpu") if quantization else device
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype or "auto",
                attn_implementation=attention,
                use_safetensors=True,
                device_map={"": placed},
            )
        if quantization is not None:
            quantize_linears(model.base_model, quantization, device)
        backbone = cls(model.to(device), name=Path(name).name if Path(name).is_dir() else str(name))
        backbone._directory = directory
        backbone.hashing = hashing
        backbone.quantization = quantization
        backbone.rank = rank
        return backbone

    def quantize(self, kind: Quantization) -> None:
        """Replaces the decoder's linear layers in place by ones of a byte a weight, and lets the old weights go.

        The digest stays that of the weights as they were: heads belong to them, quantised or not.
        """
        if self.rank is not None:
            raise QuantizationError(f"{self.name} is shared out by tensor_parallel and not quantised; load it whole")
        if self.quantization is not None:
            raise QuantizationError(f"{self.name} is quantised to {self.quantization} already; load it again")
        self._digest = self.digest
        quantize_linears(self.model.base_model, kind, self.device)
        self.quantization = kind

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Of what the LM head reads (a few models project to another size before it)."""
        return int(self.lm_head_weight.shape[1])

    @property
    def vocab_size(self) -> int:
        return int(self.lm_head_weight.shape[0])

    @property
    def max_positions(self) -> int:
        """The longest context that the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """[V, d]."""
        return self.model.get_output_embeddings().weight

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights: of the safetensors files in name order, or of the tensors of a model in memory."""
        if self._digest is not None:
            return self._digest
        if self.hashing is not None:
            return self.hashing.result()
        return weights_digest(self._directory) if self._directory else _tensors_digest(self.model)

    @torch.no_grad()
    def hidden_states(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Plain causal forward: what the LM head reads, [B, T, d]. Padding on the right changes nothing before it."""
        return self.trainable_hidden_states(input_ids_BT)

    def trainable_hidden_states(self, input_ids_BT: torch.Tensor, rows: PackedRows | None = None) -> torch.Tensor:
        """`hidden_states` with whatever gradient the weights ask for; of `rows` packed in one line [1, N], each as if
        it stood alone."""
        self._use(_plain_attention(self.config) if rows is None else PACKED_ATTENTION)
        packing = {} if rows is None else {"rows": rows, "position_ids": rows.position_1N}
        output = self.model.base_model(input_ids=input_ids_BT, use_cache=False, **packing)
        return output.last_hidden_state

    @torch.no_grad()
    def tree_hidden_states(
        self, input_ids_BN: torch.Tensor, position_ids_BN: torch.Tensor, tree: TreeAttention
    ) -> torch.Tensor:
        """Forward of each sequence's tree nodes over its cached tokens: [B, N, d]. `tree` holds the cache."""
        self._use(TREE_ATTENTION)
        return self.model.base_model(
            input_ids=input_ids_BN, position_ids=position_ids_BN, use_cache=False, tree=tree
        ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., V], as the model's own forward gives them."""
        return self.cap(self.model.get_output_embeddings()(hidden))

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The input embeddings, [...] -> [..., d]. Raises UnsupportedModelError where they have another size than the
        hidden states."""
        embedded: torch.Tensor = self.model.get_input_embeddings()(token_ids)
        if embedded.shape[-1] != self.hidden_size:
            raise UnsupportedModelError(
                f"{self.config.model_type} has embeddings of size {embedded.shape[-1]} and hidden states of size "
                f"{self.hidden_size}; heads that see embeddings need one size"
            )
        return embedded

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logit scale and final soft-cap, for the LM head's and the heads' raw logits alike."""
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (bound := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = bound * torch.tanh(logits / bound)
        return logits

    def _use(self, attention: str) -> None:
        if self.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)

    @torch.no_grad()
    def _see_through(self) -> tuple[int, tuple[int, int]]:
        """Runs two tokens: every layer attends once and alike, and `logits` are the model's own. Returns its heads."""
        token_ids, probe, kind = torch.arange(2, device=self.device)[None], _Probe(), self.config.model_type
        self.tree_hidden_states(token_ids, token_ids, probe)
        alike = len(probe.shapes) == 1 and all(key_size == value_size for *_, key_size, value_size in probe.shapes)
        if sorted(probe.layers) != list(range(self.num_layers)) or not alike:
            raise UnsupportedModelError(
                f"{kind} attends in layers {probe.layers} with (query heads, heads, key size, value size) "
                f"{sorted(probe.shapes)}; "
                f"the KV cache needs each of {self.num_layers} layers once, and keys and values of one size in all"
            )
        logits = self.logits(self.hidden_states(token_ids)).float()
        own_logits = self.model(input_ids=token_ids, use_cache=False).logits.float()
        if logits.shape != own_logits.shape or (logits - own_logits).abs().max() > 0.01 * own_logits.abs().max():
            raise UnsupportedModelError(
                f"{kind} changes hidden states or logits around its LM head in a way not covered"
            )
        query_heads, heads, size, _ = probe.shapes.pop()
        return query_heads, (heads, size)


class _Probe:
    """Stands in for the KV cache once, to see what the layers bring."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int, int]] = set()

    def attend(
        self, layer: int, query_BHND: torch.Tensor, key_BHND: torch.Tensor, value_BHND: torch.Tensor, *_: object
    ) -> torch.Tensor:
        self.layers.append(layer)
        self.shapes.add((query_BHND.shape[1], key_BHND.shape[1], key_BHND.shape[3], value_BHND.shape[3]))
        return query_BHND.new_zeros(*query_BHND.transpose(1, 2).shape[:3], value_BHND.shape[3])


def default_device(device: str | torch.device | None) -> torch.device:
    """As asked; otherwise a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_supported(config: PretrainedConfig, model_class: type | None = None) -> None:
    """Raises UnsupportedModelError, naming the kind, for models whose trees would decode wrongly."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; only decoders can carry Medusa heads")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{kind} is multimodal; save its text model on its own and give that")
    for parameters in _rope_parameters(config):
        rope = parameters.get("rope_type", parameters.get("type", "default"))
        if rope not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"{kind} has RoPE of type {rope!r}; supported are {sorted(ROPE_TYPES)}, whose angles depend on "
                "a token's own position alone"
            )
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise UnsupportedModelError(f"{kind} has layers of type {sorted(unknown)}; supported are {sorted(LAYER_TYPES)}")
    for name in ("kv_lora_rank", "num_kv_shared_layers", "attention_chunk_size", "ssm_cfg", "state_size"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"{kind} has {name}={getattr(config, name)}; its KV cache is not supported")
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise UnsupportedModelError(f"{kind} has no causal language model in transformers")
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedModelError(f"{kind} keeps a recurrent state, which a tree of drafts cannot share")
    if not all(getattr(model_class, f"_supports_{way}", False) for way in ("sdpa", "attention_backend")):
        raise UnsupportedModelError(
            f"{kind} ({model_class.__name__}) attends in a way of its own, outside transformers' attention registry"
        )


def _plain_attention(config: PretrainedConfig) -> str:
    """transformers' "sdpa" drops the soft-cap on attention scores (Gemma 2) without a word."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # Gemma 3: one entry a layer type
    return nested or [rope]


def _tensors_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
