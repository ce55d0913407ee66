"""Exported heads, as the other programs read them: each twin below loads a folder the way that program does, by the
names, keys and defaults of its own code, and must compute what this project's heads compute, bit for bit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from medusa.checkpoint import (
    BackboneRef,
    CheckpointError,
    CheckpointMeta,
    CheckpointMismatchError,
    load_checkpoint,
    save_checkpoint,
)
from medusa.export.layouts import ExportError
from medusa.export.reference import import_checkpoint
from medusa.export.write import FORMATS, export_checkpoint
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.weights import weights_digest

HUB_ID = "somebody/chat-7b"


def random_heads(backbone, vocabulary="own", dtype=torch.float32, **changes):
    truncated = {"truncated_vocab_size": 24} if vocabulary == "truncated" else {}
    sizes = {"hidden_size": backbone.hidden_size, "vocab_size": backbone.vocab_size, "num_heads": 3, "num_layers": 1}
    config = HeadsConfig(vocabulary=vocabulary, **(sizes | truncated | changes))
    generator = torch.Generator().manual_seed(0)
    token_map = torch.randperm(backbone.vocab_size, generator=generator)[:24] if truncated else None
    heads = MedusaHeads(config, token_map)
    for parameter in heads.parameters():
        parameter.data.normal_(generator=generator)
    return heads.to(dtype)


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


@pytest.fixture
def save(tmp_path, backbone, tiny_llama):
    def write(**changes):
        heads = random_heads(backbone, **changes)
        reference = BackboneRef(name=HUB_ID, weights_digest=weights_digest(tiny_llama))
        save_checkpoint(tmp_path / "heads", heads, CheckpointMeta(heads=heads.config, backbone=reference))
        return tmp_path / "heads", heads

    return write


@pytest.fixture(scope="module")
def hidden(backbone):
    return torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(1))


class ReferenceBlock(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return x + functional.silu(self.linear(x))


def as_the_reference(folder, hidden_size, vocab_size):
    """Its config's defaults where a key is absent, one block repeated, and names that do not fit ignored."""
    config = {"medusa_num_heads": 4, "medusa_num_layers": 1} | json.loads((folder / "config.json").read_text())
    heads = nn.ModuleList(
        nn.Sequential(
            *([ReferenceBlock(hidden_size)] * config["medusa_num_layers"]),
            nn.Linear(hidden_size, vocab_size, bias=False),
        )
        for _ in range(config["medusa_num_heads"])
    )
    state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    missing, unexpected = heads.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return heads, config


class TgiError(Exception):
    pass


def as_tgi(folder, hidden, lm_head_weight):
    """Own matrices are tried first, then one block over the LM head. A key "architectures" ends in no heads at all."""
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model_name_or_path"] and "medusa_num_heads" in config
    if "architectures" in config:
        raise TgiError("no speculator")
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    results = []
    for head in range(config["medusa_num_heads"]):
        x = hidden
        own = f"{head}.{config['medusa_num_layers']}.weight" in tensors
        if not own and config["medusa_num_layers"] != 1:
            raise TgiError("the shared kind has one block")
        for layer in range(config["medusa_num_layers"]):
            name = f"{head}.{layer}.linear"
            x = x + functional.silu(functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
        matrix = tensors[f"{head}.{config['medusa_num_layers']}.weight"] if own else lm_head_weight
        results.append(functional.linear(x, matrix))
    return results


def as_vllm(folder, hidden):
    """Folds keys with "num", drops tensors whose names it does not know, biases among them when not asked for."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "medusa"
    for key in list(config):
        if "num" in key and "heads" in key:
            config["num_heads"] = config.pop(key)
        elif "num" in key and "layers" in key:
            config["num_hidden_layers"] = config.pop(key)
    defaults = {"hidden_size": 4096, "vocab_size": 32001, "num_heads": 5, "num_hidden_layers": 1}
    made = SimpleNamespace(**(defaults | config))
    bias, shared = getattr(made, "medusa_fc_bias", False), getattr(made, "original_lm_head", False)
    truncated = made.truncated_vocab_size or made.vocab_size
    parameters = {}
    for head in range(made.num_heads):
        for layer in range(made.num_hidden_layers):
            parameters[f"blocks.{head}.layers.{layer}.weight"] = (made.hidden_size, made.hidden_size)
            if bias:
                parameters[f"blocks.{head}.layers.{layer}.bias"] = (made.hidden_size,)
        parameters["lm_head.weight" if shared else f"lm_heads.{head}.weight"] = (truncated, made.hidden_size)
    loaded, token_map = {}, None
    (file,) = folder.glob("*.safetensors")
    for name, tensor in load_file(file).items():
        if name == "token_map":
            token_map = tensor if truncated < made.vocab_size else None
        elif name in parameters:
            loaded[name] = tensor
        elif shared and name == "lm_heads.0.weight":
            loaded["lm_head.weight"] = tensor
    assert truncated == made.vocab_size or token_map is not None
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == parameters
    results = []
    for head in range(made.num_heads):
        x = hidden
        for layer in range(made.num_hidden_layers):
            name = f"blocks.{head}.layers.{layer}"
            x = x + functional.silu(functional.linear(x, loaded[f"{name}.weight"], loaded.get(f"{name}.bias")))
        logits = functional.linear(x, loaded["lm_head.weight" if shared else f"lm_heads.{head}.weight"])
        if token_map is not None:
            full = torch.full((*logits.shape[:-1], made.vocab_size), -torch.inf)
            full[..., token_map] = logits
            logits = full
        results.append(logits)
    return results


def plain_logits(heads, hidden, lm_head_weight):
    """This project's heads by plain products: what its packed ones compute up to rounding."""
    return [
        functional.linear(heads.features(k, hidden), heads.vocabulary_weight(k, lm_head_weight))
        for k in range(heads.config.num_heads)
    ]


def test_the_reference_computes_the_same(save, tmp_path, backbone, hidden):
    folder, heads = save()
    exported = export_checkpoint(folder, "medusa", tmp_path / "out")
    loaded, config = as_the_reference(exported.path, backbone.hidden_size, backbone.vocab_size)
    assert config["base_model_name_or_path"] == HUB_ID
    expected = plain_logits(heads, hidden, backbone.lm_head_weight)
    assert all(torch.equal(head(hidden), logits) for head, logits in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}, {"vocabulary": "shared"}])
def test_tgi_computes_the_same(save, tmp_path, backbone, hidden, changes):
    folder, heads = save(**changes)
    exported = export_checkpoint(folder, "tgi", tmp_path / "out")
    found = as_tgi(exported.path, hidden, backbone.lm_head_weight)
    expected = plain_logits(heads, hidden, backbone.lm_head_weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, {"vocabulary": "shared"}])
def test_tgi_reads_a_checkpoint_as_it_was_trained(save, backbone, hidden, changes):
    folder, heads = save(**changes)
    found = as_tgi(folder, hidden, backbone.lm_head_weight)
    expected = plain_logits(heads, hidden, backbone.lm_head_weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}, {"vocabulary": "shared"}, {"vocabulary": "truncated"}])
def test_vllm_computes_the_same(save, tmp_path, backbone, tiny_llama, hidden, changes):
    folder, heads = save(**changes)
    exported = export_checkpoint(folder, "vllm", tmp_path / "out", str(tiny_llama))
    found = as_vllm(exported.path, hidden)
    assert len(found) == 3 and found[0].shape[-1] == backbone.vocab_size
    if "token_map" in heads.state_dict():
        found = [logits[..., heads.token_map] for logits in found]
    expected = plain_logits(heads, hidden, backbone.lm_head_weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("format", ["medusa", "tgi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_changes_no_bit(save, tmp_path, backbone, format, dtype):
    folder, heads = save(dtype=dtype)
    exported = export_checkpoint(folder, format, tmp_path / "out")
    import_checkpoint(exported.path, tmp_path / "back", backbone)
    again = load_checkpoint(tmp_path / "back").heads.state_dict()
    assert {name: tensor.dtype for name, tensor in again.items()} == dict.fromkeys(heads.state_dict(), dtype)
    assert all(torch.equal(tensor, again[name]) for name, tensor in heads.state_dict().items())
    second = export_checkpoint(tmp_path / "back", format, tmp_path / "again", HUB_ID)
    for file in sorted(path.name for path in exported.path.iterdir()):
        if not file.endswith(".pt"):  # an archive of torch's names its own folder inside
            assert (second.path / file).read_bytes() == (exported.path / file).read_bytes(), file


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("medusa", {"vocabulary": "shared"}, "the Medusa reference gives each head .* a shared vocabulary"),
        ("medusa", {"vocabulary": "truncated"}, "the Medusa reference gives each head .* a truncated vocabulary"),
        ("medusa", {"num_layers": 2}, "the Medusa reference repeats one block instead of 2"),
        ("tgi", {"vocabulary": "truncated"}, "TGI reads heads .* a truncated vocabulary of 24 tokens"),
        ("tgi", {"vocabulary": "shared", "num_layers": 2}, "TGI reads heads with the shared LM head only with one"),
        ("vllm", {"vocabulary": "shared"}, "vLLM wants the shared LM head in the folder"),
        ("transformers", {}, "no adapter/, so its backbone is a model of its own"),
        ("gguf", {}, "'gguf' is no export format; it is one of vllm, tgi, medusa, transformers"),
    ],
)
def test_what_a_program_cannot_read_is_refused_by_name(save, tmp_path, format, changes, message):
    folder, _ = save(**changes)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(folder, format, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "transformers"])
def test_other_kinds_of_heads_are_refused_by_name(tmp_path, backbone, format):
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=2)
    heads = HydraHeads.initialised(config, backbone.lm_head_weight)
    reference = BackboneRef(name=HUB_ID, weights_digest=backbone.digest)
    save_checkpoint(tmp_path / "heads", heads, CheckpointMeta.of(heads, reference))
    with pytest.raises(
        ExportError, match=f"holds hydra heads.*{format} reads Medusa heads only.*train.heads.kind=medusa"
    ):
        export_checkpoint(tmp_path / "heads", format, tmp_path / "out")


def test_the_backbone_that_is_named_must_be_theirs(save, tmp_path, make_backbone_dir, tiny_llama):
    folder, _ = save()
    with pytest.raises(CheckpointMismatchError, match="these heads belong to somebody/chat-7b"):
        export_checkpoint(folder, "tgi", tmp_path / "out", str(make_backbone_dir("llama", seed=1)))
    exported = export_checkpoint(folder, "tgi", tmp_path / "out", str(tiny_llama))
    named = json.loads((exported.path / "config.json").read_text())["base_model_name_or_path"]
    assert named == str(tiny_llama.resolve())
    assert any("not checked" in note for note in export_checkpoint(folder, "tgi", tmp_path / "hub", HUB_ID).notes)


def test_a_backbone_that_nobody_could_find_is_asked_for(tmp_path, backbone):
    heads = random_heads(backbone)
    reference = BackboneRef(name="chat-8m", weights_digest="sha256:0")
    save_checkpoint(tmp_path / "heads", heads, CheckpointMeta(heads=heads.config, backbone=reference))
    with pytest.raises(ExportError, match=r"these heads only know it as 'chat-8m'; give its folder or hub id"):
        export_checkpoint(tmp_path / "heads", "tgi", tmp_path / "out")


def test_a_folder_is_whole_or_not_there(save, tmp_path, monkeypatch):
    folder, _ = save()
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        export_checkpoint(folder, "tgi", tmp_path / "taken")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medusa.export.write.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(folder, "tgi", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads", "taken"]
