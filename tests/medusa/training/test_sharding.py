"""FSDP2 on two CPU workers: the losses of one process, through a save, a kill and a load, and on one worker after."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule

from medusa.heads import HeadsConfig
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.training.schedule import HeadsLossConfig, JointConfig, TrainerConfig
from medusa.training.sharding import shard
from medusa.training.trainer import Trainer
from tests.medusa.training.test_joint import FAST, make_rows

JOINTS = {
    "heads": None,
    "lora": JointConfig(rank=4, dropout=0.0, heads_weight=1.0, heads_only_ratio=0.25),
    "full": JointConfig(method="full", heads_weight=1.0),
}


def make_trainer(folder, joint, optimizer="adamw", **distributed):
    backbone = Backbone.from_pretrained(folder, device="cpu")
    config = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = HydraHeads.initialised(config, backbone.lm_head_weight)
    soft = HeadsLossConfig(kind="soft")
    numbers = TrainerConfig(**FAST, loss=soft, joint=joint, optimizer=optimizer, activation_checkpointing=True)
    return Trainer(backbone, heads, make_rows(25), numbers, **distributed)


def run(trainer, until=None):
    losses = []
    while not trainer.finished and (until is None or trainer.step < until):
        losses.append(trainer.take_record(trainer.train_step(trainer.next_batches()))["loss"])
    return losses


def worker(rank: int, world_size: int, folder: Path, name: str, port: int, work: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    distributed = {"rank": rank, "world_size": world_size, "wrap": shard}
    first = make_trainer(folder, JOINTS[name], **distributed)
    assert first.sharded
    grouped = [isinstance(layer, FSDPModule) for layer in first.backbone.model.model.layers]
    assert grouped == [JOINTS[name] is not None] * 2  # a frozen backbone stays whole
    before = run(first, until=3)
    first.save_state(work / "state")
    dist.barrier()
    second = make_trainer(folder, JOINTS[name], **distributed)
    second.load_state(work / "state")
    losses = before + run(second)
    validation = second.validate(make_rows(7, seed=5))["loss"]
    weights = second.whole_weights(keep=rank == 0)
    if rank == 0:
        torch.save({"losses": losses, "validation": validation, "weights": weights}, work / "sharded.pt")
    dist.barrier()
    dist.destroy_process_group()


def one_worker(rank: int, folder: Path, name: str, port: int, work: Path) -> None:
    """Goes on alone from what two workers wrote."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=1)
    trainer = make_trainer(folder, JOINTS[name], wrap=shard)
    assert trainer.sharded
    trainer.load_state(work / "state")
    torch.save(run(trainer), work / "alone.pt")
    if find_spec("bitsandbytes"):
        with pytest.raises(ValueError, match="adamw_8bit keeps moments that cannot be sharded; use adamw with FSDP"):
            make_trainer(folder, JOINTS[name], optimizer="adamw_8bit", wrap=shard)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["heads", "lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_sharded_workers_resumed_give_the_losses_of_one_process(tiny_llama, tmp_path, name):
    mp.spawn(worker, args=(2, tiny_llama, name, free_port(), tmp_path), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    alone = make_trainer(tiny_llama, JOINTS[name])
    expected_losses = run(alone)
    assert sharded["losses"] == pytest.approx(expected_losses, rel=1e-5)
    assert sharded["validation"] == pytest.approx(alone.validate(make_rows(7, seed=5))["loss"], rel=1e-4)
    expected = alone.whole_weights()
    assert set(sharded["weights"]) == set(expected)
    for weight_name, weight in sharded["weights"].items():
        torch.testing.assert_close(weight, expected[weight_name], rtol=1e-2, atol=1e-3, msg=weight_name)
    mp.spawn(one_worker, args=(tiny_llama, name, free_port(), tmp_path), nprocs=1)
    assert torch.load(tmp_path / "alone.pt", weights_only=True) == pytest.approx(expected_losses[3:], rel=1e-5)
