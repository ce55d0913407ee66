"""Weights of one byte: exact rounding, bounds, memory that is let go, and models that keep decoding as themselves."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from medusa import Engine, SamplingParams
from medusa.checkpoint import CheckpointMismatchError, save_checkpoint
from medusa.kernels.linear import pack
from medusa.model import Backbone
from medusa.quantization import (
    QuantizationError,
    QuantizedWeight,
    check_device,
    dequantize,
    error_bound,
    linear,
    quantize,
)
from medusa.quantized_linear import QuantizedLinear, quantize_linears
from medusa.tokenizer import ChatTokenizer
from tests.medusa.engine.support import TREES, checkpoint_of, install_oracle, random_prompts

KINDS = ("int8", "fp8")
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def test_int8_rounds_to_the_nearest_step_ties_to_even():
    weight = torch.tensor([[127.0, 0.4, 0.5, 1.5, 2.5, -0.5, -1.5, -126.6], [-1.27, 0.005, 0.0149, 0.0151, 0, 0, 0, 0]])
    quantized = quantize(weight, "int8")
    assert quantized.values.dtype == torch.int8
    assert quantized.values[0].tolist() == [127, 0, 0, 2, 2, 0, -2, -127]
    assert quantized.values[1, :1].tolist() == [-127]
    assert quantized.values[1, 2:4].tolist() == [1, 2]
    assert torch.allclose(quantized.scale, torch.tensor([1.0, 0.01]), rtol=1e-6)


def test_fp8_rounds_to_the_nearest_e4m3():
    weight = torch.tensor([[448.0, 17.0, 19.0, 2**-9 * 0.4, 2**-9 * 1.6, -433.0]])
    quantized = quantize(weight, "fp8")
    assert quantized.values.float()[0].tolist() == [448, 16, 20, 0, 2**-8, -448]  # 17 and 19 lie between 16, 18 and 20
    assert quantized.scale.tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_stay_within_their_bound_and_come_near_it(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 500, generator=generator) * torch.logspace(-4, 1, 64)[:, None]
    weight[::7, 3] *= 1000  # outliers
    weight = weight.to(dtype)
    error = (dequantize(quantize(weight, kind)) - weight.float()).abs()
    bound = error_bound(weight, kind)
    assert (error <= bound).all()
    assert (error / bound.clamp_min(1e-38)).max() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_the_smallest_numbers(kind):
    weight = torch.zeros(4, 8)
    weight[1], weight[2, 0], weight[3] = 1e-44, 1e-38, -0.0
    quantized = quantize(weight, kind)
    assert (quantized.scale > 0).all()
    back = dequantize(quantized)
    assert torch.isfinite(back).all()
    assert ((back - weight).abs() <= error_bound(weight, kind)).all()
    assert not back[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad):
    weight = torch.ones(3, 3)
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        quantize(weight, "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_multiplies_by_the_rounded_weight(kind):
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(40, 30)
    x = torch.randn(2, 5, 40, generator=generator)
    weight = quantize(layer.weight, kind)
    quantized = QuantizedLinear(weight, layer.bias)
    expected = x @ dequantize(weight).T + layer.bias
    assert torch.allclose(quantized(x), expected, atol=1e-5)
    assert not torch.allclose(quantized(x), layer(x), atol=1e-5)
    half = quantized(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, linear(x.to(torch.bfloat16).float(), weight, layer.bias).to(torch.bfloat16))


def test_joined_weights_are_one_below_the_other():
    parts = [quantize(torch.randn(rows, 8), "fp8") for rows in (3, 5)]
    whole = QuantizedWeight.joined(parts)
    assert whole.shape == (8, 8)
    assert torch.equal(dequantize(whole), torch.cat([dequantize(part) for part in parts]))


@pytest.mark.parametrize("packed", [False, True])
def test_the_old_weights_are_let_go(tiny_llama, packed):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    if packed:  # an engine has run on it
        pack(backbone.model)
    decoder = backbone.model.base_model
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    before = sum(layer.weight.nbytes for layer in linears)
    storages = [weakref.ref(layer.weight) for layer in linears]
    del linears
    backbone.quantize("int8")
    gc.collect()
    assert storages and all(storage() is None for storage in storages)
    layers = [module for module in decoder.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == len(storages) == 14
    after = sum(layer.quantized.nbytes for layer in layers)
    assert after < before / 4 * 1.1  # float32 before, and a scale a row
    held = [*decoder.parameters(), *decoder.buffers()]
    assert (
        sum(tensor.untyped_storage().nbytes() for tensor in held if tensor.dim() == 2) < before / 4 + 512 * 64 * 4 + 1
    )


def test_loading_quantised_equals_quantising_what_was_loaded(tiny_llama):
    loaded = Backbone.from_pretrained(tiny_llama, device="cpu", quantization="int8")
    plain = Backbone.from_pretrained(tiny_llama, device="cpu")
    digest = plain.digest
    plain.quantize("int8")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.hidden_states(ids), plain.hidden_states(ids))
    assert loaded.quantization == plain.quantization == "int8"
    assert loaded.digest == plain.digest == digest
    with pytest.raises(QuantizationError, match="already"):
        plain.quantize("fp8")


def test_a_model_in_memory_keeps_the_digest_of_its_weights(tiny_llama):
    model = Backbone.from_pretrained(tiny_llama, device="cpu").model
    digest = Backbone(model, name="memory").digest
    backbone = Backbone(model, name="memory")
    backbone.quantize("fp8")
    assert backbone.digest == digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "opt"])
def test_trees_are_lossless_against_the_quantised_model(make_backbone_dir, family, kind):
    """Medusa and plain decoding agree, and both say what the quantised model's own plain forward says."""
    folder = make_backbone_dir(family, tie_word_embeddings=False)
    backbone = Backbone.from_pretrained(folder, device="cpu", quantization=kind)
    engine = Engine(
        backbone, ChatTokenizer.from_pretrained(folder), checkpoint_of(backbone), speculation="off", max_batch_size=3
    )
    prompts = random_prompts([5, 9, 21])
    plain = engine.generate(prompts, GREEDY)
    for prompt, reply in zip(prompts, plain, strict=True):
        text = [*prompt, *reply.token_ids]
        logits = backbone.logits(backbone.hidden_states(torch.tensor([text])))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(reply.token_ids)[:, None])[:, 0]
        assert (chosen >= logits.max(1).values - 1e-3).all()
    install_oracle(engine, [[*prompt, *reply.token_ids] for prompt, reply in zip(prompts, plain, strict=True)])
    engine.set_tree(TREES[16])
    medusa = engine.generate(prompts, GREEDY)
    assert [reply.token_ids for reply in medusa] == [reply.token_ids for reply in plain]
    assert max(max(reply.accepted_per_step) for reply in medusa) > 1


def test_heads_belong_to_the_weights_before_quantisation(make_backbone_dir, tmp_path):
    folder, other = make_backbone_dir("llama"), make_backbone_dir("llama", seed=1)
    made = checkpoint_of(Backbone.from_pretrained(folder, device="cpu"))
    save_checkpoint(tmp_path / "heads", made.heads, made.meta)
    arguments = {"device": "cpu", "speculation": "off", "quantization": "int8"}
    engine = Engine.from_pretrained(folder, tmp_path / "heads", **arguments)
    assert engine.backbone.quantization == "int8"
    with pytest.raises(CheckpointMismatchError):
        Engine.from_pretrained(other, tmp_path / "heads", **arguments)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_models_with_matrices_elsewhere_are_refused_whole(make_backbone_dir, family):
    backbone = Backbone.from_pretrained(make_backbone_dir(family), device="cpu")
    with pytest.raises(QuantizationError, match="outside linear layers"):
        backbone.quantize("int8")
    assert backbone.quantization is None
    assert not any(isinstance(module, QuantizedLinear) for module in backbone.model.modules())


def test_fp8_is_refused_by_name_where_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(QuantizationError, match=r"NVIDIA A100.*8\.0.*use int8"):
        check_device("fp8", torch.device("cuda"))
    check_device("int8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device("fp8", torch.device("cuda"))


def test_an_unknown_kind_is_refused(tiny_llama):
    with pytest.raises(QuantizationError, match=r"int8.*fp8.*'int4'"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), "int4", CPU)
