"""Planning training: sizes are those of real models, results say what they rest on, what does not fit is refused."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from medusa.config import ConfigError
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.training.loss import Teacher, heads_loss
from medusa.training.schedule import HeadsLossConfig
from pipelines.plan.figures import FIGURES, Figure, TrainRow, load_figures, weakest
from pipelines.plan.shapes import HeadsCost, ModelShape, model_shape
from pipelines.plan.training import Data, Recipe, flops_per_token, memory_items, plan_training

ROOT = Path(__file__).resolve().parents[3]
FIGURES_READ = load_figures()
VICUNA = "lmsys/vicuna-7b-v1.5"
SHAPE = FIGURES_READ.models[VICUNA]
HEADS = HeadsConfig(hidden_size=4096, vocab_size=32000, num_heads=5)
DATA = Data(conversations=60_000, prompt_tokens=200, reply_tokens=800)


def plan(recipe=None, gpu="a100-80gb", figures=FIGURES_READ, model=VICUNA, data=DATA, **asked):
    recipe = recipe or Recipe(heads=HEADS)
    return plan_training(model, figures.models[model], recipe, data, gpu, figures, **asked)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model_itself(make_backbone_dir, family, tied):
    folder = make_backbone_dir(family, tie_word_embeddings=tied)
    shape = model_shape(str(folder), {})
    parameters = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    small = ("bias", "q_norm", "k_norm")  # not counted: they are nothing beside a matrix
    counted = sum(p.numel() for name, p in parameters.items() if not any(word in name for word in small))
    assert shape.parameters == counted
    assert shape.tied == tied


def test_adapters_and_heads_have_their_real_sizes(tiny_llama):
    peft = pytest.importorskip("peft")
    shape = model_shape(str(tiny_llama), {})
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), peft.LoraConfig(r=4, target_modules=layers)
    )
    assert shape.lora_parameters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for changes in ({}, {"vocabulary": "shared"}, {"vocabulary": "truncated", "truncated_vocab_size": 9}):
        config = HeadsConfig(hidden_size=16, vocab_size=40, num_layers=2, **changes)
        token_map = torch.arange(9) if "truncated_vocab_size" in changes else None
        for kind, made in (("medusa", MedusaHeads), ("hydra", HydraHeads)):
            assert HeadsCost.of(config, kind).parameters == sum(p.numel() for p in made(config, token_map).parameters())
    shared, own = (HeadsCost.of(HeadsConfig(hidden_size=16, vocab_size=40, vocabulary=v)) for v in ("shared", "own"))
    hydra = [HeadsCost.of(HeadsConfig(hidden_size=16, vocab_size=40, vocabulary=v), "hydra") for v in ("shared", "own")]
    assert hydra[0].read == hydra[1].read > hydra[0].parameters + 40 * 16  # the LM head anew for each head
    assert shared.multiplied == own.multiplied and shared.parameters < shared.read < own.read == own.parameters


def test_the_optimiser_takes_what_is_planned():
    heads = MedusaHeads(HeadsConfig(hidden_size=32, vocab_size=100, num_heads=2))
    optimizer = torch.optim.AdamW(heads.parameters())
    sum(p.sum() for p in heads.parameters()).backward()
    optimizer.step()
    tensors = [t for p in heads.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.ndim]
    recipe = Recipe(heads=heads.config)
    items = memory_items(SHAPE, recipe, 0)
    planned = (items["heads"] + items["heads' gradients and optimiser"]) * 2**30
    assert planned == sum(t.numel() * t.element_size() for t in tensors)


def test_known_models_have_the_sizes_they_are_named_for():
    for name, shape in FIGURES_READ.models.items():
        billions = float(re.search(r"-(\d+(?:\.\d+)?)[bB]", name)[1])
        assert 0.94 * billions < shape.parameters / 1e9 < 1.09 * billions, name


def test_every_measured_figure_stands_in_a_document():
    rows = FIGURES_READ.measured
    for row in (*rows.decode, *rows.tree_steps, *rows.train, *rows.tokens_per_step):
        document = ROOT / row.source.partition(",")[0]
        assert document.is_file(), f"{row.source}: a measurement names the document that holds its command"
    for row in rows.tokens_per_step:
        text = (ROOT / row.source.partition(",")[0]).read_text()
        digits = 3 if any(round(tokens, 2) != tokens for tokens in row.nodes.values()) else 2
        assert all(f"{tokens:.{digits}f}" in text for nodes, tokens in row.nodes.items() if nodes > 1), row
    performance = (ROOT / "docs/performance.md").read_text()
    assert all(f"{row.seconds * 1e3:.3f}" in performance for row in rows.decode)
    for row in rows.tree_steps:
        ratios = [ratio for by_nodes in row.over_plain.values() for ratio in by_nodes.values()]
        assert all(f"{ratio:.3f}" in performance for ratio in ratios), row


def test_without_measurements_everything_is_called_an_estimate():
    found = plan()
    assert (found.num_gpus, found.strategy) == (1, "one GPU")
    assert {found.distill_hours.basis, found.train_hours.basis, found.hours.basis} == {"estimate"}
    assert found.memory_each == pytest.approx(sum(found.memory.values()))
    assert found.hours.value == pytest.approx(found.distill_hours.value + found.train_hours.value)


def test_a_measurement_is_used_and_named():
    row = TrainRow(gpu="a100-80gb", model=VICUNA, method="heads", tokens_per_second=10_000, source="docs/x.md")
    figures = replace(FIGURES_READ, measured=replace(FIGURES_READ.measured, train=[row]))
    own = plan(figures=figures).train_hours
    assert (own.basis, own.how) == ("measured", "docs/x.md")
    assert own.value == pytest.approx(2 * 60_000 * 1000 / 10_000 / 3600)
    zephyr = plan(figures=figures, model="HuggingFaceH4/zephyr-7b-beta").train_hours
    assert zephyr.basis == "derived" and VICUNA in zephyr.how
    assert zephyr.value / own.value == pytest.approx(
        FIGURES_READ.models["HuggingFaceH4/zephyr-7b-beta"].parameters / SHAPE.parameters
    )
    assert plan(figures=figures, model="lmsys/vicuna-33b-v1.3").train_hours.basis == "estimate"  # 4.8 times as large
    assert plan(figures=figures, gpu="h100-80gb").train_hours.basis == "estimate"
    assert plan(Recipe(heads=HEADS, method="lora"), figures=figures).train_hours.basis == "estimate"


def test_a_measurement_of_medusa_heads_on_tokens_is_scaled_for_others():
    measured = plan(gpu="h200-141gb").train_hours
    assert measured.basis == "measured"
    for changes in ({"loss": "soft"}, {"kind": "hydra"}, {"kind": "hydra", "loss": "soft"}):
        others = plan(Recipe(heads=HEADS, **changes), gpu="h200-141gb").train_hours
        assert others.basis == "derived" and others.value > measured.value
    recipe = Recipe(heads=HEADS, loss="soft", micro_batch=4)
    asked, told = (flops_per_token(SHAPE, r, 0.8)[0] for r in (recipe, replace(recipe, loss="tokens")))
    assert asked - told == pytest.approx(5 * 2 * 4096 * 32000 * 0.8)  # the teacher anew for each of five heads
    one_chunk = replace(recipe, chunk_size=8192)
    assert flops_per_token(SHAPE, one_chunk, 0.8)[0] - told == pytest.approx(2 * 4096 * 32000 * 0.8)


class LiveTensors(TorchDispatchMode):
    """The most bytes that tensors of a MiB or more held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(found):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= 2**20 and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return found


@pytest.mark.parametrize("kept", [None, 5_000])
@pytest.mark.parametrize("kind", ["tokens", "soft"])
def test_a_chunk_of_logits_takes_what_is_planned(kind, kept):
    rows, vocab, size = 64, 20_000, 8
    truncated = {"vocabulary": "truncated", "truncated_vocab_size": kept} if kept else {}
    config = HeadsConfig(hidden_size=size, vocab_size=vocab, num_heads=2, **truncated)
    weight_Vd = torch.randn(vocab, size, dtype=torch.bfloat16)
    heads = MedusaHeads.initialised(config, weight_Vd, torch.arange(kept) if kept else None).to(torch.bfloat16)
    hidden_Nd = torch.randn(rows, size, dtype=torch.bfloat16)
    labels_NK = torch.randint(0, vocab, (rows, 2))
    teacher = Teacher(hidden_Nd, weight_Vd, lambda logits: logits)
    with LiveTensors() as tensors:
        heads_loss(
            heads, hidden_Nd, labels_NK, weight_Vd, teacher.cap, teacher=teacher, config=HeadsLossConfig(kind=kind)
        )
    shape = replace(SHAPE, hidden_size=size, vocab_size=vocab)
    planned = memory_items(shape, Recipe(heads=config, loss=kind, chunk_size=rows), 0)["logits, one chunk"] * 2**30
    assert 0.9 * planned < tensors.peak <= 1.01 * planned  # two rows more of the teacher's


def test_a_result_is_as_good_as_its_worst_figure():
    figures = [Figure(1, basis, "") for basis in ("measured", "published", "derived")]
    assert weakest(*figures) == "published" and weakest(figures[0]) == "measured"


def test_gpus_are_added_until_the_time_is_kept():
    one, found = plan(), plan(max_hours=2)
    assert found.hours.value <= 2 < one.hours.value and found.num_gpus > 1 and found.strategy == "ddp"
    assert plan(num_gpus=found.num_gpus // 2).hours.value > 2
    assert plan(num_gpus=4).hours.value == pytest.approx(one.hours.value / 4)
    with pytest.raises(ConfigError, match=r"on 64 x a100-80gb would take .* hours; choose other GPUs"):
        plan(max_hours=0.01)


def test_what_does_not_fit_one_gpu_is_spread():
    full = Recipe(heads=HEADS, method="full", distils=True, checkpointing=True)
    found = plan(full)
    assert found.strategy == "fsdp" and found.num_gpus > 1
    assert found.memory_each <= found.memory_gpu < sum(found.memory.values())
    assert found.memory["frozen teacher"] == pytest.approx(SHAPE.parameters * 2 / 2**30)
    with pytest.raises(ConfigError, match="GiB a GPU, where"):
        plan(full, num_gpus=1)
    with pytest.raises(ConfigError, match="do not fit one l4-24gb for distillation"):
        plan(gpu="l4-24gb", model="lmsys/vicuna-33b-v1.3")


def test_each_saving_saves_what_it_should():
    def items(**changes):
        return memory_items(SHAPE, Recipe(heads=HEADS, **changes), 1.5)

    plain, optimiser = items(), "heads' gradients and optimiser"
    assert items(weight_bits=4)["backbone"] < 0.35 * plain["backbone"]
    assert items(optimizer="adamw_8bit")[optimiser] == pytest.approx(plain[optimiser] * 6 / 12)
    lora, again = items(method="lora"), items(method="lora", checkpointing=True)
    assert lora["activations of the backbone"] > 5 * again["activations of the backbone"]
    adapters = lora["adapters"] + lora["adapters' gradients and optimiser"]
    assert adapters == pytest.approx(SHAPE.lora_parameters(32) * 16 / 2**30)
    assert items()["heads"] > 7 * memory_items(SHAPE, Recipe(heads=replace(HEADS, vocabulary="shared")), 1.5)["heads"]
    assert "frozen teacher" not in items(method="lora", distils=True)  # the adapter is switched off instead
    full = items(method="full", distils=True)
    assert full["backbone"] == pytest.approx(2 * plain["backbone"]) and "frozen teacher" in full


def test_distillation_has_memory_of_its_own():
    found = plan(Recipe(heads=HEADS, distill_batch=16))
    length = DATA.prompt_tokens + DATA.reply_tokens
    assert found.distill_memory["KV cache"] == pytest.approx(16 * length * SHAPE.kv_bytes_per_token / 2**30)
    large = plan(Recipe(heads=HEADS, distill_batch=4096))
    assert sum(large.distill_memory.values()) <= large.memory_gpu and "batch 4096" not in large.distill_hours.how


def test_joint_training_costs_more_and_a_first_stage_less():
    heads, joint = plan().train_hours.value, plan(Recipe(heads=HEADS, method="lora", distils=True)).train_hours.value
    staged = plan(Recipe(heads=HEADS, method="lora", distils=True, heads_only_ratio=0.5)).train_hours.value
    assert 2 * heads < joint and staged == pytest.approx((heads + joint) / 2)


def test_models_and_gpus_that_are_not_known_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no figures of the GPU 'v100'; known are h200-141gb"):
        plan(gpu="v100")
    with pytest.raises(ConfigError, match=r"the sizes of 'org/other' are not known.*lmsys/vicuna-7b-v1.5"):
        model_shape("org/other", FIGURES_READ.models)
    (tmp_path / "config.json").write_text('{"n_embd": 64}')
    with pytest.raises(ConfigError, match="has no \\['hidden_size'"):
        model_shape(str(tmp_path), {})
    assert isinstance(ModelShape.from_config(_config(), "x"), ModelShape) and FIGURES.is_file()


def _config():
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
    }
