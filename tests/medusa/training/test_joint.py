"""Medusa-2: the two terms, the adapter-off teacher, rates, stages, resume. On a tiny random Llama."""

from __future__ import annotations

import math
import random

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.training.adaptation import AdaptationError, LoraAdaptation
from medusa.training.batch import IGNORE, Row
from medusa.training.schedule import HeadsLossConfig, JointConfig, TrainerConfig, heads_weight, learning_rate
from medusa.training.trainer import Trainer

NUM_HEADS = 2
FAST = {"batch_size": 6, "max_length": 40, "lr": 5e-3, "bucket_batches": 2, "epochs": 2}
NO_DROPOUT = JointConfig(rank=4, alpha=8.0, dropout=0.0)


def make_rows(count=24, seed=0, vocab=512):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]

    return [Row.of(ids(2, 8), ids(4, 14)) for _ in range(count)]


def make_trainer(folder, joint=NO_DROPOUT, rows=None, dtype=None, **changes):
    backbone = Backbone.from_pretrained(folder, device="cpu", dtype=dtype)
    config = HeadsConfig(num_heads=NUM_HEADS, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    return Trainer(backbone, heads, rows or make_rows(), TrainerConfig(**(FAST | changes), joint=joint))


def run(trainer, steps=None):
    records = []
    while not trainer.finished and (steps is None or trainer.step < steps):
        records.append(trainer.take_record(trainer.train_step(trainer.next_batches())))
    return records


def losses(trainer, steps=None):
    return [record["loss"] for record in run(trainer, steps)]


def objective_at_once(trainer, folder):
    """L = KL(base || model) / labels + lambda_0 sum 0.8^(k+1) L_k, by whole logits and autograd."""
    base = Backbone.from_pretrained(folder, device="cpu")
    (batch,) = trainer.next_batches()
    hidden_Nd, weight_Vd = trainer.adaptation.student(batch)
    with torch.no_grad():
        teacher_NV = base.logits(base.hidden_states(batch.tokens_BT)).flatten(0, 1)[batch.positions_N]
    student_NV = trainer.backbone.cap(hidden_Nd @ weight_Vd.T)
    kl = kl_div(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), log_target=True, reduction="sum")
    total = kl / len(batch.next_N)
    for k in range(NUM_HEADS):
        logits = trainer.heads.features(k, hidden_Nd) @ trainer.heads.vocabulary_weight(k, weight_Vd).T
        total = total + 0.2 * 0.8 ** (k + 1) * cross_entropy(logits, batch.labels_NK[:, k], ignore_index=IGNORE)
    return total


def nudge(trainer):
    """Away from the start, where adapter and blocks are zero and half of the gradients vanish."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.optimiser.parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_those_of_whole_logits(tiny_llama, checkpointing):
    trainer = make_trainer(tiny_llama, chunk_size=7, activation_checkpointing=checkpointing, grad_clip=None)
    nudge(trainer)
    expected = objective_at_once(trainer, tiny_llama)
    parameters = list(trainer.optimiser.parameters.values())
    wanted = torch.autograd.grad(expected, parameters)
    captured = []
    trainer.optimiser.step = lambda rate: captured.extend(p.grad.clone() for p in parameters)
    metrics = trainer.train_step(trainer.next_batches())
    assert float(metrics.loss) == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(captured, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_computes_each_layer_again(tiny_llama, checkpointing, method):
    joint = JointConfig(method=method, lm_loss="tokens")  # no teacher, which would run the layers too
    trainer = make_trainer(tiny_llama, joint, activation_checkpointing=checkpointing)
    runs = dict.fromkeys(range(len(trainer.backbone.model.model.layers)), 0)

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    for index, layer in enumerate(trainer.backbone.model.model.layers):
        layer.mlp.register_forward_pre_hook(count(index))
    trainer.train_step(trainer.next_batches())
    assert set(runs.values()) == {2 if checkpointing else 1}


def test_heads_train_the_backbone_too(tiny_llama):
    """The hidden states are not detached: without an LM term the adapter still gets a gradient."""
    trainer = make_trainer(tiny_llama, grad_clip=None)
    gradients = {}
    trainer.optimiser.step = lambda rate: gradients.update(
        {name: p.grad.abs().sum().item() for name, p in trainer.optimiser.parameters.items()}
    )
    trainer.train_step(trainer.next_batches())  # at the start KL is 0 and so is its gradient
    assert all(value > 0 for name, value in gradients.items() if "lora_B" in name)


def test_teacher_is_the_base_model_to_the_last_bit_after_training(tiny_llama):
    trainer = make_trainer(tiny_llama)
    run(trainer, 4)
    base = Backbone.from_pretrained(tiny_llama, device="cpu")
    (batch,) = trainer.next_batches()
    hidden_Nd, weight_Vd = trainer.adaptation.teacher(batch)
    expected = base.hidden_states(batch.tokens_BT).flatten(0, 1)[batch.positions_N]
    assert torch.equal(hidden_Nd, expected) and torch.equal(weight_Vd, base.lm_head_weight)
    student_Nd, _ = trainer.adaptation.student(batch)
    assert not torch.allclose(student_Nd, expected, atol=1e-4)
    assert all(p.requires_grad for p in trainer.optimiser.parameters.values())


@pytest.mark.parametrize("joint", [JointConfig(rank=4, train_lm_head=True), JointConfig(method="full")])
def test_teacher_has_the_lm_head_of_the_base_where_it_learns_too(tiny_llama, joint):
    trainer = make_trainer(tiny_llama, joint)
    run(trainer, 4)
    base = Backbone.from_pretrained(tiny_llama, device="cpu")
    (batch,) = trainer.next_batches()
    hidden_Nd, weight_Vd = trainer.adaptation.teacher(batch)
    assert torch.equal(weight_Vd, base.lm_head_weight)
    assert torch.equal(hidden_Nd, base.hidden_states(batch.tokens_BT).flatten(0, 1)[batch.positions_N])
    assert not torch.allclose(trainer.adaptation.student(batch)[1], weight_Vd, atol=1e-4)


def test_adapters_sit_on_every_linear_layer_but_the_lm_head(tiny_llama):
    trainer = make_trainer(tiny_llama)
    names = {name.rpartition(".lora_")[0] for name in trainer.optimiser.parameters if name.startswith("model.")}
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)
    assert JointConfig() == JointConfig(rank=32, alpha=16.0, dropout=0.05, train_lm_head=False)


def test_lm_head_takes_an_adapter_on_demand_and_not_when_tied(make_backbone_dir, tiny_llama):
    joint = JointConfig(rank=4, dropout=0.0, train_lm_head=True)
    trainer = make_trainer(tiny_llama, joint)
    run(trainer, 3)
    (batch,) = trainer.next_batches()
    hidden_Nd, weight_Vd = trainer.adaptation.student(batch)
    torch.testing.assert_close(hidden_Nd @ weight_Vd.T, trainer.backbone.logits(hidden_Nd), rtol=1e-4, atol=1e-4)
    assert not torch.equal(weight_Vd, trainer.adaptation.teacher(batch)[1])
    with pytest.raises(AdaptationError, match="ties its LM head"):
        make_trainer(make_backbone_dir("llama", tie_word_embeddings=True), joint)


def test_backbone_learns_at_a_quarter_of_the_heads_rate_biases_too(tiny_llama):
    trainer = make_trainer(tiny_llama, warmup_steps=0, schedule="constant")
    trainer.train_step(trainer.next_batches())
    rate_of = {
        id(parameter): group["lr"] for group in trainer.optimiser.torch.param_groups for parameter in group["params"]
    }
    expected = {"heads": 5e-3, "model": 1.25e-3}
    for name, parameter in trainer.optimiser.parameters.items():
        assert rate_of[id(parameter)] == pytest.approx(expected[name[:5]]), name


def test_first_stage_is_medusa_1_and_the_second_starts_its_own_schedule(tiny_llama):
    joint = JointConfig(rank=4, dropout=0.0, heads_only_ratio=0.5)
    trainer = make_trainer(tiny_llama, joint)
    alone = make_trainer(tiny_llama, None, max_steps=4, loss=HeadsLossConfig(kind="tokens"))
    assert trainer.total_steps == 8
    first, medusa_1 = run(trainer, 4), run(alone)
    for name in ("head_0/loss", "head_1/loss", "learning_rate"):
        assert [r[name] for r in first] == pytest.approx([r[name] for r in medusa_1], rel=2e-4), name
    assert not any("lm/loss" in record for record in first)
    assert all(not p.any() for name, p in trainer.optimiser.parameters.items() if "lora_B" in name)
    second = run(trainer)
    assert all("lm/loss" in record for record in second) and second[0]["lm/loss"] == pytest.approx(0, abs=1e-6)
    assert all(p.any() for name, p in trainer.optimiser.parameters.items() if "lora_B" in name)


def test_heads_weight_ramps_by_a_quarter_sine():
    config = TrainerConfig(joint=JointConfig(heads_weight=0.01, heads_weight_schedule="sine"))
    weights = [heads_weight(config, step, 100) for step in range(100)]
    assert weights[49] == pytest.approx(0.01 * math.sin(math.pi / 4)) and weights[99] == pytest.approx(0.01)
    early = TrainerConfig(joint=JointConfig(heads_weight_schedule="linear", ramp_ratio=0.5, heads_only_ratio=0.5))
    assert [heads_weight(early, step, 8) for step in range(8)] == pytest.approx([0.2] * 4 + [0.1, 0.2, 0.2, 0.2])
    assert heads_weight(TrainerConfig(), 3, 10) == 1.0


def test_each_stage_warms_up():
    config = TrainerConfig(lr=1.0, warmup_steps=2, joint=JointConfig(heads_only_ratio=0.5))
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6:9] == [0.5, 1.0, 1.0] and rates[5] < 0.3


@pytest.mark.parametrize(
    "joint",
    [
        JointConfig(rank=4, dropout=0.1, heads_weight=1.0),
        JointConfig(method="full", heads_weight=1.0, heads_only_ratio=0.25),
        JointConfig(rank=4, lm_loss="tokens", heads_weight=1.0),
    ],
)
def test_joint_training_lowers_the_heads_loss_and_resumes_bit_equal(tiny_llama, tmp_path, joint):
    undisturbed = losses(make_trainer(tiny_llama, joint))
    first = make_trainer(tiny_llama, joint)
    before = losses(first, 3)
    first.save_state(tmp_path / "state")
    second = make_trainer(tiny_llama, joint)
    second.load_state(tmp_path / "state")
    assert before + losses(second) == undisturbed
    assert undisturbed[-1] < undisturbed[0]


def test_full_fine_tuning_keeps_the_base_as_teacher(tiny_llama):
    trainer = make_trainer(tiny_llama, JointConfig(method="full"))
    records = run(trainer, 4)
    assert records[0]["lm/loss"] == pytest.approx(0, abs=1e-6) and records[-1]["lm/loss"] > 1e-5
    base = Backbone.from_pretrained(tiny_llama, device="cpu")
    (batch,) = trainer.next_batches()
    expected = base.hidden_states(batch.tokens_BT).flatten(0, 1)[batch.positions_N]
    assert torch.equal(trainer.adaptation.teacher(batch)[0], expected)


def test_distillation_holds_the_model_closer_to_the_base_than_tokens_do(tiny_llama):
    def kl_to_base(lm_loss):
        joint = JointConfig(rank=8, dropout=0.0, lm_loss=lm_loss)
        trainer = make_trainer(tiny_llama, joint, max_steps=12, lr=2e-2)
        run(trainer)
        (batch,) = trainer.next_batches()
        with torch.no_grad():
            (student_Nd, student), (base_Nd, base) = (
                trainer.adaptation.student(batch),
                trainer.adaptation.teacher(batch),
            )
        p, q = (base_Nd @ base.T).log_softmax(-1), (student_Nd @ student.T).log_softmax(-1)
        return kl_div(q, p, log_target=True, reduction="batchmean").item()

    assert kl_to_base("distill") < 0.5 * kl_to_base("tokens")


def test_bfloat16_backbone_trains_float32_adapters(tiny_llama):
    trainer = make_trainer(tiny_llama, dtype=torch.bfloat16, max_steps=6, lr=1e-2)
    records = run(trainer)
    assert {p.dtype for p in trainer.optimiser.parameters.values()} == {torch.float32}
    assert records[-1]["head_0/loss"] < records[0]["head_0/loss"]


def test_dropout_is_seeded_by_the_step_and_leaves_the_generator_alone(tiny_llama):
    """Nothing that drew random numbers before or between changes a loss; the seed does."""
    found = []
    for seed, drawn in ((0, 0), (0, 1000), (1, 0)):
        torch.manual_seed(5 + drawn)
        trainer = make_trainer(tiny_llama, JointConfig(rank=4, dropout=0.5, lm_loss="tokens"), seed=seed)
        before = torch.get_rng_state()
        first = losses(trainer, 1)
        assert torch.equal(torch.get_rng_state(), before)
        torch.randn(1 + drawn)
        found.append(first + losses(trainer, 3))
    assert found[0] == found[1] and found[0] != pytest.approx(found[2])


@pytest.mark.parametrize("train_lm_head", [False, True])
def test_adapter_is_saved_as_peft_reads_it(tiny_llama, tmp_path, train_lm_head):
    trainer = make_trainer(tiny_llama, JointConfig(rank=4, dropout=0.0, train_lm_head=train_lm_head))
    assert isinstance(trainer.adaptation, LoraAdaptation)
    run(trainer, 4)
    weights = {name.removeprefix("model."): weight for name, weight in trainer.whole_weights().items()}
    trainer.adaptation.save(tmp_path / "adapter", weights)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = model(ids).logits
        read = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits
        trainer.backbone.model.eval()
        trained = trainer.backbone.logits(trainer.backbone.hidden_states(ids))
    torch.testing.assert_close(read, trained, rtol=1e-5, atol=1e-5)
    assert (read - base).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"heads_weight": 0.0}, "heads_weight must be above 0"),
        ({"ramp_ratio": 0.0}, "ramp_ratio must be above 0"),
        ({"method": "full", "train_lm_head": True}, "train_lm_head must be false"),
    ],
)
def test_joint_numbers_out_of_range_are_refused(bad, named):
    with pytest.raises(ValueError, match=named):
        JointConfig(**bad)


def test_hidden_cache_is_refused_where_joint_training_has_no_teacher():
    with pytest.raises(ValueError, match="hidden_cache_gib must be 0 in joint training without a teacher"):
        TrainerConfig(hidden_cache_gib=1.0, joint=JointConfig(lm_loss="tokens"))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_remembered_teacher_changes_no_numbers(tiny_llama, method, packing):
    joint = JointConfig(method=method, rank=4, dropout=0.0, heads_only_ratio=0.3)
    numbers = dict(max_steps=8, packing=packing, dtype=torch.float64)  # rounding would grow from step to step
    asked = run(make_trainer(tiny_llama, joint, **numbers))
    trainer = make_trainer(tiny_llama, joint, hidden_cache_gib=0.1, hidden_cache_on="device", **numbers)
    trainer.memory.fill(200)
    remembered = run(trainer)
    for one, other in zip(remembered, asked, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_heads_learn_soft_targets_of_a_frozen_backbone_and_tokens_beside_one_that_learns():
    assert TrainerConfig().heads_loss == HeadsLossConfig(kind="soft")
    assert TrainerConfig(joint=JointConfig()).heads_loss == HeadsLossConfig(kind="tokens")
    for joint in (None, JointConfig()):
        for chosen in (HeadsLossConfig(kind="tokens"), HeadsLossConfig(kind="soft")):
            assert TrainerConfig(joint=joint, loss=chosen).heads_loss == chosen


@pytest.mark.parametrize("joint", [None, NO_DROPOUT])
def test_the_loss_of_no_choice_is_the_one_that_is_trained(tiny_llama, joint):
    named = HeadsLossConfig(kind="soft" if joint is None else "tokens")
    other = HeadsLossConfig(kind="tokens" if joint is None else "soft")
    unnamed = losses(make_trainer(tiny_llama, joint, max_steps=2))
    assert unnamed == losses(make_trainer(tiny_llama, joint, max_steps=2, loss=named))
    assert unnamed != pytest.approx(losses(make_trainer(tiny_llama, joint, max_steps=2, loss=other)), rel=0.01)


def test_soft_targets_train_jointly(tiny_llama):
    trainer = make_trainer(
        tiny_llama, JointConfig(rank=4, heads_weight=1.0), loss=HeadsLossConfig(kind="soft"), max_steps=12
    )
    records = run(trainer)
    assert records[-1]["head_0/loss"] < records[0]["head_0/loss"]
