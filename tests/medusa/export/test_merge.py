"""The merged model of joint training: what peft itself computes with the adapter on, as plain Transformers weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa import Engine, SamplingParams
from medusa.adapter import write_merged
from medusa.checkpoint import (
    AdapterRef,
    BackboneRef,
    CheckpointMeta,
    CheckpointMismatchError,
    load_checkpoint,
    save_checkpoint,
)
from medusa.digests import directory_digest
from medusa.export.layouts import ExportError
from medusa.export.write import export_checkpoint
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.weights import weights_digest

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def joint(tmp_path, tiny_llama):
    """A checkpoint with an adapter beside it, and the logits of base and adapter by peft."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(0)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.eval()
    with torch.no_grad():
        logits = adapted(IDS).logits
        with adapted.disable_adapter():
            base_logits = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merged = write_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged by the trainer")
    config = HeadsConfig(hidden_size=64, vocab_size=512, num_heads=2)
    heads = MedusaHeads.initialised(config, model.get_output_embeddings().weight.detach())
    base = BackboneRef(name="tiny", weights_digest=weights_digest(tiny_llama))
    meta = CheckpointMeta.of(
        heads,
        BackboneRef(name="tiny", weights_digest=merged),
        adapter=AdapterRef(base=base, digest=directory_digest(tmp_path / "adapter")),
    )
    save_checkpoint(tmp_path / "heads", heads, meta, adapter=tmp_path / "adapter")
    return tmp_path / "heads", logits, base_logits


def test_the_merged_model_is_the_adapted_one(joint, tmp_path, tiny_llama):
    folder, logits, base_logits = joint
    exported = export_checkpoint(folder, "transformers", tmp_path / "merged", str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(exported.path, dtype="auto")
    assert not any("lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        merged_logits = model(IDS).logits
    assert (merged_logits - logits).abs().max() < 1e-4 < (merged_logits - base_logits).abs().max()
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert weights_digest(exported.path) in exported.notes[0]


def test_its_heads_are_pinned_to_the_merged_weights_and_to_no_others(joint, tmp_path, tiny_llama):
    folder, _, _ = joint
    exported = export_checkpoint(folder, "transformers", tmp_path / "merged", str(tiny_llama))
    merged = Backbone.from_pretrained(exported.path, device="cpu")
    again = load_checkpoint(exported.path / "medusa", merged)
    before = load_checkpoint(folder).heads.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.heads.state_dict().items())
    with pytest.raises(CheckpointMismatchError):
        load_checkpoint(exported.path / "medusa", Backbone.from_pretrained(tiny_llama, device="cpu"))
    engine = Engine.from_pretrained(exported.path, exported.path / "medusa", speculation="off", max_batch_size=1)
    assert len(engine.generate(["Hello"], SamplingParams(max_tokens=4, temperature=0.0))[0].token_ids) <= 4
    for format in ("vllm", "tgi", "medusa"):
        export_checkpoint(exported.path / "medusa", format, tmp_path / format, str(exported.path))


def test_an_adapter_is_merged_into_its_own_base_only(joint, tmp_path, make_backbone_dir):
    folder, _, _ = joint
    with pytest.raises(CheckpointMismatchError, match="give the backbone that it was trained on"):
        export_checkpoint(folder, "transformers", tmp_path / "merged", str(make_backbone_dir("llama", seed=5)))
    assert not (tmp_path / "merged").exists()


def test_only_the_merged_model_is_what_other_programs_load(joint, tmp_path, tiny_llama):
    folder, _, _ = joint
    with pytest.raises(ExportError, match="export it with --format transformers first"):
        export_checkpoint(folder, "vllm", tmp_path / "out")
    with pytest.raises(CheckpointMismatchError, match="these heads belong to tiny"):
        export_checkpoint(folder, "vllm", tmp_path / "out", str(tiny_llama))
