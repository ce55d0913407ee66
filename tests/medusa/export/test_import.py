"""Published heads: what is taken, what is refused, and that weights stay as they were."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from medusa import Engine, SamplingParams, TokenTree
from medusa.checkpoint import CheckpointError, load_checkpoint
from medusa.export.reference import import_checkpoint
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


def published(folder, backbone, num_heads=3, layers=1, prefix="", dtype=torch.float16, pt=True, shared=False, **config):
    """A folder as the reference's trainer leaves it."""
    generator = torch.Generator().manual_seed(3)
    size, vocab, tensors = backbone.hidden_size, backbone.vocab_size, {}
    for head in range(num_heads):
        for layer in range(layers):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(size, size, generator=generator)
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(size, generator=generator)
        if not shared:
            tensors[f"{head}.{layers}.weight"] = torch.randn(vocab, size, generator=generator)
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in tensors.items()}
    folder.mkdir()
    torch.save(tensors, folder / "medusa_lm_head.pt") if pt else save_file(
        tensors, folder / "medusa_lm_head.safetensors"
    )
    named = {"medusa_num_heads": num_heads, "medusa_num_layers": layers, "base_model_name_or_path": backbone.name}
    (folder / "config.json").write_text(json.dumps(named | config))
    return folder, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"pt": False},
        {"layers": 2, "dtype": torch.float32},
        {"prefix": "medusa_head."},
        {"prefix": "medusa_heads.", "pt": False},
        {"shared": True},
    ],
)
def test_published_weights_stay_bit_for_bit(tmp_path, backbone, kind):
    source, tensors = published(tmp_path / "published", backbone, **kind)
    imported = import_checkpoint(source, tmp_path / "heads", backbone, "digest")
    checkpoint = load_checkpoint(tmp_path / "heads")
    found = checkpoint.heads.state_dict()
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert imported.heads == checkpoint.config and imported.notes == ()
    assert checkpoint.config.vocabulary == ("shared" if kind.get("shared") else "own")
    assert checkpoint.meta.backbone.weights_digest == backbone.digest
    assert checkpoint.meta.backbone.tokenizer_digest == "digest"
    assert checkpoint.meta.training["imported"]["config"]["medusa_num_heads"] == 3


def test_imported_heads_decode_without_loss(tmp_path, tiny_llama, backbone):
    source, _ = published(tmp_path / "published", backbone, dtype=torch.float32)
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    import_checkpoint(source, tmp_path / "heads", backbone, tokenizer.digest)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    plain = Engine(backbone, tokenizer).generate(["The quick"], params)
    engine = Engine(backbone, tokenizer, load_checkpoint(tmp_path / "heads", backbone), speculation="off")
    engine.set_tree(TokenTree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]]))
    assert engine.generate(["The quick"], params)[0].token_ids == plain[0].token_ids


def test_a_config_that_disagrees_with_the_weights_is_told(tmp_path, backbone):
    source, _ = published(tmp_path / "p", backbone, medusa_num_heads=2, base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    imported = import_checkpoint(source, tmp_path / "heads", backbone)
    assert imported.heads.num_heads == 3
    assert "medusa_num_heads=2, the weights hold 3" in imported.notes[0]
    assert "names the backbone lmsys/vicuna-7b-v1.3" in imported.notes[1]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_an_archive_that_could_run_code_is_refused(tmp_path, backbone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, _ = published(tmp_path / "published", backbone)
    for write in (lambda file: torch.save({"0.0.linear.weight": RunsCode()}, file), _old_pickle):
        write(source / "medusa_lm_head.pt")
        with pytest.raises(CheckpointError, match="is refused: it holds more than tensors, and loading it could run"):
            import_checkpoint(source, tmp_path / "heads", backbone)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "heads").exists()


def _old_pickle(file):
    file.write_bytes(pickle.dumps({"0.0.linear.weight": RunsCode()}))


def break_file(source, name, content):
    (source / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s / "config.json").unlink(), "config.json is missing"),
        (lambda s: break_file(s, "config.json", b"{"), "config.json is not JSON"),
        (lambda s: break_file(s, "config.json", b"[]"), "must hold an object, got list"),
        (lambda s: (s / "medusa_lm_head.pt").unlink(), "neither medusa_lm_head.safetensors nor medusa_lm_head.pt"),
        (lambda s: break_file(s, "medusa_lm_head.safetensors", b"x" * 40), "medusa_lm_head.safetensors is damaged"),
        (lambda s: torch.save([torch.zeros(1)], s / "medusa_lm_head.pt"), "a mapping of names to tensors, got list"),
        (lambda s: torch.save({}, s / "medusa_lm_head.pt"), "no residual block at all"),
    ],
)
def test_a_folder_that_is_not_in_the_layout_is_refused(tmp_path, backbone, change, message):
    source, _ = published(tmp_path / "published", backbone)
    change(source)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, tmp_path / "heads", backbone)
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.bias"), "does not hold 3 whole heads"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), r"unexpected: \['lm_head.weight'\]"),
        (
            lambda t: t.update({"2.0.linear.bias": t["2.0.linear.bias"].fill_(torch.inf)}),
            "2.0.linear.bias .* NaN or inf",
        ),
        (lambda t: t.update({"0.0.linear.bias": t["0.0.linear.bias"].float()}), "heads have one floating dtype"),
    ],
)
def test_weights_that_are_no_whole_heads_are_refused(tmp_path, backbone, change, message):
    source, tensors = published(tmp_path / "published", backbone)
    change(tensors)
    torch.save(tensors, source / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, tmp_path / "heads", backbone)


def test_heads_of_another_size_are_refused_with_both(tmp_path, backbone, make_backbone_dir):
    source, _ = published(tmp_path / "published", backbone)
    other = Backbone.from_pretrained(make_backbone_dir("llama", hidden_size=32, head_dim=8), device="cpu")
    with pytest.raises(CheckpointError, match="hidden size of 64 and 512 tokens, but .* has 32 and 512"):
        import_checkpoint(source, tmp_path / "heads", other)
