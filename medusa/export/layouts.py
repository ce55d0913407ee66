"""How other programs want Medusa heads: names of tensors, keys of config.json, and what each cannot take.

    reference   FasterDecoding/Medusa   {h}.{l}.linear.weight|bias, {h}.{L}.weight in medusa_lm_head.pt
    TGI         text-generation-inference, the same names in medusa_lm_head.safetensors
    vLLM        0.31 and 0.32 (0.33 has no Medusa), blocks.{h}.layers.{l}.weight|bias, lm_heads.{h}.weight, token_map

Pure functions of a checkpoint. A layout that a program would load wrongly or not at all is an ExportError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from medusa.checkpoint import Checkpoint, CheckpointError

WEIGHTS = "medusa_lm_head.safetensors"
REFERENCE_WEIGHTS = "medusa_lm_head.pt"
VLLM_WEIGHTS = "model.safetensors"
TGI_VOCABULARIES = {"own", "shared"}


class ExportError(CheckpointError):
    """The program asked for cannot read these heads; the message says what stands in the way and what to do."""


@dataclass(frozen=True)
class Layout:
    """One weights file and its config.json."""

    weights_file: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


def reference_layout(checkpoint: Checkpoint, backbone: str) -> Layout:
    """What the authors' own code loads. Its config knows no vocabularies but own ones."""
    heads = checkpoint.config
    if heads.vocabulary != "own":
        raise ExportError(
            f"the Medusa reference gives each head a vocabulary matrix of its own, but these heads have a "
            f"{heads.vocabulary} vocabulary; train with heads.vocabulary=own"
        )
    if heads.num_layers > 1:
        raise ExportError(
            f"the Medusa reference repeats one block instead of {heads.num_layers} of their own, so it would compute "
            "something else; train with heads.num_layers=1"
        )
    config = {
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "base_model_name_or_path": backbone,
    }
    return Layout(REFERENCE_WEIGHTS, _tensors(checkpoint), config)


def tgi_layout(checkpoint: Checkpoint, backbone: str) -> Layout:
    """TGI's first kind of heads (own matrices), or its second (one block, the LM head shared), which it tries next.

    No key "architectures": with one, TGI takes the folder for another kind of speculator and loads no heads at all.
    """
    heads = checkpoint.config
    if heads.vocabulary not in TGI_VOCABULARIES:
        raise ExportError(
            f"TGI reads heads with own vocabulary matrices or the shared LM head, but these have a {heads.vocabulary} "
            f"vocabulary of {heads.head_vocab_size} tokens and it knows no token map; train with "
            "heads.vocabulary=shared"
        )
    if heads.vocabulary == "shared" and heads.num_layers > 1:
        raise ExportError(
            f"TGI reads heads with the shared LM head only with one residual block, but these have "
            f"{heads.num_layers}; train with heads.num_layers=1, or with heads.vocabulary=own"
        )
    config = {
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "base_model_name_or_path": backbone,
    }
    return Layout(WEIGHTS, _tensors(checkpoint), config)


def vllm_layout(checkpoint: Checkpoint, lm_head_weight: torch.Tensor | None = None) -> Layout:
    """vLLM's own names. A shared vocabulary carries a copy of the LM head, which vLLM does not take from the backbone.

    Traps: without medusa_fc_bias the biases are dropped without a word; every key with "num" and "heads" in it becomes
    the number of heads, "num" and "layers" that of blocks; hidden_size and vocab_size default to another model's.
    """
    heads = checkpoint.config
    renamed = {}
    for name, tensor in _tensors(checkpoint).items():
        head, _, rest = name.partition(".")
        layer, _, kind = rest.partition(".linear.")
        if name == "token_map":
            renamed[name] = tensor
        elif kind:
            renamed[f"blocks.{head}.layers.{layer}.{kind}"] = tensor
        else:
            renamed[f"lm_heads.{head}.weight"] = tensor
    if heads.vocabulary == "shared":
        if lm_head_weight is None or tuple(lm_head_weight.shape) != (heads.vocab_size, heads.hidden_size):
            raise ExportError(
                "vLLM wants the shared LM head in the folder of the heads; give the backbone that has it (--backbone)"
            )
        first = renamed["blocks.0.layers.0.weight"]
        renamed["lm_heads.0.weight"] = lm_head_weight.detach().to("cpu", first.dtype, copy=True).contiguous()
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "num_heads": heads.num_heads,
        "num_hidden_layers": heads.num_layers,
        "truncated_vocab_size": heads.head_vocab_size,
        "original_lm_head": heads.vocabulary == "shared",
        "medusa_fc_bias": True,
    }
    return Layout(VLLM_WEIGHTS, renamed, config)


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.heads.state_dict().items()}
