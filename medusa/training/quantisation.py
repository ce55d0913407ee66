"""A frozen backbone in 8 or 4 bits, for training heads on a model that would not fit otherwise (bitsandbytes).

Only the linear layers of the decoder are replaced: the LM head stays as it is, since the heads' losses and copies of it
read its matrix. Heads trained on a quantised backbone are served with one; on the original they guess a little worse.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

Bits = Literal["8bit", "4bit"]


def quantise(model: PreTrainedModel, bits: Bits) -> None:
    """Replaces the decoder's linear layers in place. ImportError, with what to install, without bitsandbytes."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, _quantised(child, bits))


def _quantised(layer: nn.Linear, bits: Bits) -> nn.Module:
    bnb = _bitsandbytes()
    has_bias = layer.bias is not None
    sizes = (layer.in_features, layer.out_features, has_bias)
    if bits == "8bit":
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        dtype = layer.weight.dtype if layer.weight.dtype != torch.float32 else torch.float32
        made = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    if has_bias:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.to(layer.weight.device)  # quantises on the way


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "an 8-bit or 4-bit backbone needs bitsandbytes: pip install 'medusa-on-ray[quantized]', "
            "or set quantization to null"
        ) from error
    return bitsandbytes
