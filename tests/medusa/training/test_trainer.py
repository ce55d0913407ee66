"""The trainer: it learns, and gives the same numbers on any number of workers."""

from __future__ import annotations

import math
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.training.batch import Row
from medusa.training.hidden import HiddenCacheError
from medusa.training.schedule import HeadsLossConfig, TrainerConfig, learning_rate
from medusa.training.totals import NonFiniteLossError
from medusa.training.trainer import Trainer

NUM_HEADS = 3
FAST = {"batch_size": 8, "max_length": 48, "lr": 5e-3, "log_every": 1, "bucket_batches": 2, "epochs": 2}


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


def make_rows(count=30, vocab=512, seed=0):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]

    return [Row.of(ids(2, 8), ids(4, 20)) for _ in range(count)]


def make_trainer(backbone, rows=None, heads_changes=None, trainer_class=Trainer, **changes):
    config = HeadsConfig(
        num_heads=NUM_HEADS,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        **(heads_changes or {}),
    )
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    return trainer_class(backbone, heads, rows or make_rows(), TrainerConfig(**(FAST | changes)))


def run(trainer, steps=None):
    """Losses by step until `steps` or the end."""
    losses = []
    while not trainer.finished and (steps is None or trainer.step < steps):
        losses.append(trainer.take_record(trainer.train_step(trainer.next_batches()))["loss"])
    return losses


@pytest.mark.parametrize("heads_changes", [{}, {"vocabulary": "shared", "num_layers": 2}])
def test_overfitting_one_batch_drives_every_head_to_near_perfect_accuracy(backbone, heads_changes):
    rows = make_rows(4)
    steps = 120 if heads_changes else 40
    trainer = make_trainer(
        backbone,
        rows,
        heads_changes,
        max_steps=steps,
        batch_size=4,
        lr=2e-2,
        warmup_steps=2,
        grad_clip=None,
        loss=HeadsLossConfig(kind="tokens"),  # of random rows, which the model itself would never say
    )
    while not trainer.finished:
        record = trainer.take_record(trainer.train_step(trainer.next_batches()))
    accuracies = [record[f"head_{k}/top1_accuracy"] for k in range(NUM_HEADS)]
    assert min(accuracies) > 0.97, accuracies
    assert record["loss"] < 0.5


def test_backbone_stays_frozen_and_heads_start_as_the_lm_head(backbone):
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    trainer = make_trainer(backbone)
    assert torch.equal(trainer.heads.vocabulary_weight(0, backbone.lm_head_weight), backbone.lm_head_weight)
    run(trainer, steps=2)
    assert not torch.equal(trainer.heads.vocabulary_weight(0, backbone.lm_head_weight), backbone.lm_head_weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_pitfall_normaliser_padding_and_prompts_do_not_dilute_the_loss(backbone):
    """The same labels among longer rows of a batch (more padding) weigh the same: divide by labels, not positions."""
    row, no_label = make_rows(1)[0], Row.of([5] * 40, [6])
    alone = make_trainer(backbone, [row], batch_size=1, max_steps=1)
    beside_padding = make_trainer(backbone, [row], batch_size=1, max_steps=1)
    beside_padding.rows.append(no_label)  # past fit_rows, which would drop it
    beside_padding.sampler = lambda_sampler([0, 1])
    assert run(beside_padding) == pytest.approx(run(alone), rel=1e-5)


def lambda_sampler(indices):
    class Fixed:
        rank, world_size = 0, 1

        def __call__(self, step):
            return indices

        def global_rows(self, step):
            return indices

    return Fixed()


def test_micro_batches_change_no_numbers(backbone):
    whole = run(make_trainer(backbone))
    parts = run(make_trainer(backbone, micro_batch_size=3))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("home", "at_once"), [("host", False), ("device", True)])
def test_hidden_cache_changes_no_numbers_and_computes_each_row_once(backbone, monkeypatch, home, at_once):
    without = run(make_trainer(backbone, epochs=3))
    rows_computed = []
    compute = backbone.trainable_hidden_states

    def counted(ids_BT, rows):
        rows_computed.append(len(ids_BT))
        return compute(ids_BT, rows)

    monkeypatch.setattr(backbone, "trainable_hidden_states", counted)
    trainer = make_trainer(backbone, epochs=3, hidden_cache_gib=0.1, hidden_cache_on=home)
    if at_once:
        trainer.memory.fill(100)
    assert run(trainer) == pytest.approx(without, rel=1e-5)
    assert sum(rows_computed) == len(make_rows())


def test_rows_kept_back_are_measured_on_their_own_hidden_states(backbone):
    rows, kept_back = make_rows(12), make_rows(12, seed=9)
    trainers = [make_trainer(backbone, rows, hidden_cache_gib=gib) for gib in (0.0, 0.1)]
    losses = [(run(trainer), trainer.validate(kept_back)["loss"])[1] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_hidden_cache_over_its_limit_is_refused_before_any_work(backbone):
    with pytest.raises(HiddenCacheError, match=r"need 0\.00 GiB, hidden_cache_gib allows 1e-06"):
        make_trainer(backbone, hidden_cache_gib=1e-6)


class Poisoned(Trainer):
    """One NaN in the hidden states of one step."""

    poisoned_step = 3

    def train_step(self, batches):
        if self.step + 1 == self.poisoned_step:
            hidden_size = self.backbone.hidden_size
            batches = [replace(b, hidden_Nd=torch.full((len(b.next_N), hidden_size), math.nan)) for b in batches]
        return super().train_step(batches)


def test_nan_is_named_with_step_and_heads_and_never_saved(backbone, tmp_path):
    trainer = make_trainer(backbone, trainer_class=Poisoned)
    with pytest.raises(NonFiniteLossError, match="loss of head 0, 1, 2 is not finite at step 3") as caught:
        run(trainer)
    assert (caught.value.step, caught.value.heads) == (3, (0, 1, 2))
    with pytest.raises(NonFiniteLossError):
        trainer.save_state(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_nan_of_one_head_names_that_head(backbone):
    trainer = make_trainer(backbone)
    run(trainer, steps=2)
    trainer.heads[1][0].linear.bias.data[0] = math.nan
    with pytest.raises(NonFiniteLossError, match="head 1 is not finite at step 3"):
        run(trainer)


def test_rows_without_any_label_are_refused(backbone):
    with pytest.raises(ValueError, match="none of 1 rows carries a label"):
        make_trainer(backbone, [Row.of([1, 2, 3], [4])])


def test_bfloat16_backbone_trains_float32_heads(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu", dtype=torch.bfloat16)
    trainer = make_trainer(backbone, make_rows(8), max_steps=12, lr=1e-2)
    losses = run(trainer)
    assert {parameter.dtype for parameter in trainer.heads.parameters()} == {torch.float32}
    assert losses[-1] < losses[0]


def test_learning_rate_warms_up_then_follows_the_cosine():
    config = TrainerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[12] == pytest.approx(0.55) and rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = TrainerConfig(lr=1.0, warmup_ratio=0.5, schedule="constant")
    assert [learning_rate(constant, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"batch_size": 0}, {"max_length": 2}, {"betas": (1.0, 0.9)}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        TrainerConfig(**bad)


def ddp_worker(rank: int, world_size: int, backbone_dir: Path, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    result = ddp_run(rank, world_size, backbone_dir)
    dist.barrier()
    dist.destroy_process_group()  # after the DDP module is gone, or gloo's threads are waited for without end
    if rank == 0:
        torch.save(result, out)


def ddp_run(rank, world_size, backbone_dir):
    backbone = Backbone.from_pretrained(backbone_dir, device="cpu")
    config = HeadsConfig(num_heads=NUM_HEADS, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    trainer = Trainer(
        backbone,
        MedusaHeads.initialised(config, backbone.lm_head_weight),
        make_rows(25),  # the last batch of an epoch has one row: one worker gets none
        TrainerConfig(**(FAST | {"micro_batch_size": 3})),
        rank=rank,
        world_size=world_size,
        wrap=DistributedDataParallel,
    )
    losses = run(trainer)
    return {"losses": losses, "weight": trainer.heads[0][0].linear.weight.detach()}


@pytest.mark.timeout(120)
def test_two_workers_give_the_losses_of_one(backbone, tiny_llama, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(ddp_worker, args=(2, tiny_llama, port, tmp_path / "two.pt"), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    alone = make_trainer(backbone, make_rows(25))
    assert two["losses"] == pytest.approx(run(alone), rel=1e-5)
    torch.testing.assert_close(two["weight"], alone.heads[0][0].linear.weight.detach(), rtol=1e-3, atol=1e-5)
