"""A quantised backbone says the same by the GPU's steps as by the plain runner, whose layers torch multiplies."""

from __future__ import annotations

import os

import pytest
import torch

from medusa import Engine, SamplingParams
from medusa.engine.decoder import FusedDecoder, fuse
from medusa.engine.runners import graph_runner_of
from medusa.kernels.tiles import plan_gated_of
from medusa.model import Backbone
from medusa.quantization import QuantizedWeight
from medusa.quantized_linear import QuantizedLinear
from medusa.tokenizer import ChatTokenizer
from tests.medusa.engine.support import TREES, checkpoint_of, random_prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
PROMPTS = random_prompts([5, 19])
cpu_only = pytest.mark.skipif("MEDUSA_KERNEL_DEVICE" in os.environ, reason="the engine's own tests run it on a GPU")


class GraphEngine(Engine):
    """The GPU's runner on a CPU: its launches run in the interpreter."""

    def _runner_of(self, acceptance):
        return graph_runner_of(self.backbone, self._cache, self._drafting, acceptance)


def replies(engine_class, folder, kind, tree):
    backbone = Backbone.from_pretrained(folder, device="cpu", quantization=kind)
    checkpoint = checkpoint_of(backbone)
    engine = engine_class(
        backbone,
        ChatTokenizer.from_pretrained(folder),
        checkpoint,
        speculation="off",
        max_batch_size=2,
        max_model_len=64,
    )
    engine.set_tree(tree)
    return engine, [reply.token_ids for reply in engine.generate(PROMPTS, GREEDY)]


@cpu_only
@pytest.mark.parametrize(("family", "kind"), [("llama", "int8"), ("llama", "fp8"), ("qwen2", "int8"), ("phi3", "fp8")])
def test_runner_and_graph_runner_agree(make_backbone_dir, family, kind):
    """llama and qwen2 (with biases) are fused, phi3 goes through its modules."""
    folder = make_backbone_dir(family, tie_word_embeddings=False)
    _, expected = replies(Engine, folder, kind, None)
    engine, found = replies(GraphEngine, folder, kind, TREES[4])
    assert isinstance(engine._runner._step._layers.decoder, FusedDecoder) == (family != "phi3")
    assert found == expected


def test_fused_layers_share_the_modules_bytes(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu", quantization="int8")
    layer = backbone.model.base_model.layers[0]
    ids = torch.arange(12)[None]
    before = backbone.hidden_states(ids)
    fused = fuse(layer)
    for whole, parts in (
        (fused.qkv, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
        (fused.gate_up, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        (fused.out, [layer.self_attn.o_proj]),
        (fused.down, [layer.mlp.down_proj]),
    ):
        assert isinstance(whole, QuantizedWeight)
        for part in parts:
            assert isinstance(part, QuantizedLinear)
            assert part.values.untyped_storage().data_ptr() == whole.values.untyped_storage().data_ptr()
            assert part.scale.untyped_storage().data_ptr() == whole.scale.untyped_storage().data_ptr()
    assert torch.equal(backbone.hidden_states(ids), before)


@cpu_only
def test_many_rows_of_a_gated_product_take_two_launches(tiny_llama, monkeypatch):
    """A prompt of 70 is padded to 128 rows: gate and up are one quantised product, then gated, without a whole copy."""
    monkeypatch.setattr(torch, "mm", None)
    prompt, params = random_prompts([70]), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    replies = []
    for engine_class in (Engine, GraphEngine):
        backbone = Backbone.from_pretrained(tiny_llama, device="cpu", quantization="int8")
        tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
        engine = engine_class(backbone, tokenizer, speculation="off", max_batch_size=1, max_model_len=96)
        replies.append(engine.generate(prompt, params)[0].token_ids)
    assert plan_gated_of(128, fuse(backbone.model.base_model.layers[0]).gate_up, torch.float32) is None
    assert replies[0] == replies[1]
