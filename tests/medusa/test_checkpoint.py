"""Checkpoints: bit for bit there and back, whole or not at all, and nothing broken, foreign or pickled is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa.checkpoint import (
    BackboneRef,
    Calibration,
    CheckpointError,
    CheckpointMeta,
    CheckpointMismatchError,
    load_checkpoint,
    read_meta,
    save_checkpoint,
    update_meta,
)
from medusa.digests import directory_digest
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.tree import TokenTree

HIDDEN, VOCAB = 16, 40
VOCABULARIES = ["own", "shared", "truncated"]
WEIGHTS, META = "medusa_lm_head.safetensors", "medusa.json"


def random_heads(vocabulary="own", dtype=torch.float32, **changes):
    truncated = {"truncated_vocab_size": 8} if vocabulary == "truncated" else {}
    settings = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_heads": 3, "num_layers": 2} | truncated | changes
    config = HeadsConfig(vocabulary=vocabulary, **settings)
    generator = torch.Generator().manual_seed(0)
    token_map = torch.randperm(VOCAB, generator=generator)[:8] if vocabulary == "truncated" else None
    heads = MedusaHeads(config, token_map)
    for parameter in heads.parameters():
        parameter.data.normal_(generator=generator)
    return heads.to(dtype)


def meta_of(heads, **changes):
    backbone = BackboneRef(name="tiny", weights_digest="sha256:" + "0" * 64)
    return CheckpointMeta(**{"heads": heads.config, "backbone": backbone, **changes})


def saved(tmp_path, heads=None, **changes):
    heads = heads or random_heads()
    save_checkpoint(tmp_path / "heads", heads, meta_of(heads, **changes))
    return tmp_path / "heads"


def rewrite_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


def heads_for(backbone, **changes):
    return random_heads(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, **changes)


def ref_of(backbone):
    return BackboneRef(name=backbone.name, weights_digest=backbone.digest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_heads_come_back_bit_for_bit(vocabulary, dtype, tmp_path):
    heads = random_heads(vocabulary, dtype)
    loaded = load_checkpoint(saved(tmp_path, heads))
    before, after = heads.state_dict(), loaded.heads.state_dict()
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    assert loaded.config == loaded.heads.config == heads.config
    assert not loaded.heads.training
    assert not any(parameter.requires_grad for parameter in loaded.heads.parameters())


def test_meta_data_comes_back_whole(tmp_path):
    tree = TokenTree.from_paths([(0,), (1,), (0, 0)])
    meta = meta_of(
        random_heads(),
        backbone=BackboneRef(name="b", weights_digest="sha256:1", tokenizer_digest="sha256:2", revision="main"),
        calibration=Calibration(accuracy=[[0.5, 0.25]], num_positions=7, temperature=0.7, tokens_per_step=[1.0, 1.5]),
        trees=[[], tree.to_list()],
        training={"recipe": "medusa1", "steps": 3, "nested": {"lr": 1e-3}},
    )
    save_checkpoint(tmp_path / "heads", random_heads(), meta)
    loaded = load_checkpoint(tmp_path / "heads").meta
    assert loaded == meta
    assert TokenTree.from_paths(loaded.trees[1]) == tree


def test_a_checkpoint_is_these_four_files_and_holds_no_pickle(tmp_path):
    folder = saved(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", META, WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]
    assert "sha256:000" in (folder / "README.md").read_text()


def test_the_model_card_may_be_given(tmp_path):
    save_checkpoint(tmp_path / "heads", random_heads(), meta_of(random_heads()), readme="# Ours\n")
    assert (tmp_path / "heads" / "README.md").read_text() == "# Ours\n"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_config_json_agrees_wherever_another_loader_looks(vocabulary, tmp_path):
    config = json.loads((saved(tmp_path, random_heads(vocabulary)) / "config.json").read_text())
    # vLLM folds every key of the form num*heads into one number; all must be the number of Medusa heads.
    assert {value for key, value in config.items() if "num" in key and key.endswith("heads")} == {3}
    assert {"num_heads", "medusa_num_heads"} <= set(config)
    assert config["medusa_fc_bias"] is True
    assert (config["medusa_num_layers"], config["num_hidden_layers"]) == (2, 2)
    assert (config["hidden_size"], config["vocab_size"]) == (HIDDEN, VOCAB)
    assert config["truncated_vocab_size"] == (8 if vocabulary == "truncated" else VOCAB)
    assert config["original_lm_head"] is (vocabulary == "shared")


BREAKING = ("checkpoint.save_file", "checkpoint._loader_config", "checkpoint._default_readme", "folders.to_disk")


@pytest.mark.parametrize("failing", BREAKING)
def test_a_save_that_fails_leaves_nothing_behind(failing, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(f"medusa.{failing}", fail)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    load_checkpoint(saved(tmp_path))  # and does not stand in the way of the next


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medusa.checkpoint.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    folder = saved(tmp_path)
    before = directory_digest(folder)
    with pytest.raises(CheckpointError, match="already exists"):
        saved(tmp_path, random_heads("shared"))
    assert directory_digest(folder) == before


def test_heads_that_are_not_what_the_meta_data_says_are_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="but the meta data says"):
        save_checkpoint(tmp_path / "heads", random_heads("own"), meta_of(random_heads("shared")))
    assert list(tmp_path.iterdir()) == []


def test_a_matching_pair_loads_onto_the_backbone(backbone, tmp_path):
    heads = heads_for(backbone, dtype=torch.bfloat16)
    loaded = load_checkpoint(saved(tmp_path, heads, backbone=ref_of(backbone)), backbone)
    assert {p.dtype for p in loaded.heads.parameters()} == {backbone.dtype}
    assert torch.equal(loaded.heads[0][0].linear.weight, heads[0][0].linear.weight.float())


def test_another_backbone_is_refused_with_both_digests(backbone, tmp_path):
    folder = saved(tmp_path, heads_for(backbone))
    with pytest.raises(CheckpointMismatchError) as error:
        load_checkpoint(folder, backbone)
    assert "sha256:" + "0" * 64 in str(error.value)
    assert backbone.digest in str(error.value)


def test_update_meta_rewrites_the_named_fields_only(tmp_path):
    folder = saved(tmp_path, training={"steps": 3})
    weights = (folder / WEIGHTS).read_bytes()
    calibration = Calibration(accuracy=[[0.5]], num_positions=2)
    updated = update_meta(folder, calibration=calibration, trees=[[[0]]])
    assert read_meta(folder) == updated
    assert (updated.calibration, updated.trees, updated.training) == (calibration, [[[0]]], {"steps": 3})
    assert (folder / WEIGHTS).read_bytes() == weights
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", META, WEIGHTS]


def test_directory_digest_sees_contents_and_names_and_nothing_else(tmp_path):
    folder = saved(tmp_path)
    digest = directory_digest(folder)
    assert digest == directory_digest(folder)
    assert digest.startswith("sha256:")
    moved = folder.rename(tmp_path / "elsewhere")
    assert directory_digest(moved) == digest
    (moved / "README.md").rename(moved / "CARD.md")
    renamed = directory_digest(moved)
    (moved / "CARD.md").write_text("changed")
    assert len({digest, renamed, directory_digest(moved)}) == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "heads.pt", "a.pth", "b.pkl", "old/c.pickle", "last.ckpt"])
def test_folders_with_pickle_files_are_refused_by_name(name, tmp_path):
    folder = saved(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=name.rpartition("/")[2]) as error:
        load_checkpoint(folder)
    assert "only safetensors" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_tensor(value, tmp_path):
    folder = saved(tmp_path)

    def spoil(tensors):
        tensors["1.0.linear.bias"][3] = value

    rewrite_weights(folder, spoil)
    with pytest.raises(CheckpointError, match=r"tensor 1\.0\.linear\.bias of .* NaN or infinite"):
        load_checkpoint(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder at .*absent"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"has no {META}"):
        load_checkpoint(tmp_path / "empty")
    folder = saved(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_damaged_weights_are_refused(keep, tmp_path):
    folder = saved(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("2.1.linear.bias"), r"missing \['2\.1\.linear\.bias'\]"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
        (lambda tensors: tensors.update({"0.2.weight": torch.zeros(VOCAB + 1, HIDDEN)}), r"0\.2\.weight"),
    ],
)
def test_weights_that_do_not_fit_their_meta_data_are_refused_by_name(change, message, tmp_path):
    folder = saved(tmp_path)
    rewrite_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(speed=9), "speed"),
        (lambda content: content["heads"].update(num_head=3), r"heads\.num_head"),
        (lambda content: content["backbone"].update(digest="x"), r"backbone\.digest"),
        (lambda content: content["backbone"].pop("weights_digest"), r"backbone\.weights_digest"),
        (lambda content: content["heads"].update(num_heads="three"), r"heads\.num_heads"),
        (lambda content: content.update(head_kind="eagle"), "head_kind.*'medusa'.*'hydra'.*'eagle'"),
        (lambda content: content.update(head_kind="hydra"), "schema version 1; hydra heads have 2"),
        (lambda content: content.update(schema_version=99), "schema version 99; this release reads 1"),
        (lambda content: content.pop("schema_version"), "schema version None"),
    ],
)
def test_meta_data_that_is_not_understood_is_refused_with_the_path_of_the_key(change, message, tmp_path):
    folder = saved(tmp_path)
    rewrite_json(folder / META, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(folder)
    assert str(folder / META) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "not json"])
def test_meta_data_that_is_no_json_object_is_refused(text, tmp_path):
    folder = saved(tmp_path)
    (folder / META).write_text(text)
    with pytest.raises(CheckpointError, match=META):
        load_checkpoint(folder)


def test_a_truncated_checkpoint_without_its_map_is_refused(tmp_path):
    folder = saved(tmp_path, random_heads("truncated"))
    rewrite_weights(folder, lambda tensors: tensors.pop("token_map"))
    with pytest.raises(CheckpointError, match="token.map"):
        load_checkpoint(folder)


def test_a_map_beside_an_own_vocabulary_is_refused(tmp_path):
    folder = saved(tmp_path)
    rewrite_weights(folder, lambda tensors: tensors.update(token_map=torch.arange(8)))
    with pytest.raises(CheckpointError, match="token.map"):
        load_checkpoint(folder)
