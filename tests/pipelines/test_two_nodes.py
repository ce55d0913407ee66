"""Training over two Ray nodes (two raylets of this machine, each with room for one worker) by num_workers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medusa.training.schedule import JointConfig, TrainerConfig
from medusa.training.sharding import shard
from pipelines.train_config import TrainConfig
from pipelines.train_worker import distributed, loaded_on
from tests.pipelines.test_train import CONFIG, losses, run

ROOT = Path(__file__).parents[2]
ON_TWO_NODES = """
import json, sys, threading, time
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.pipelines.test_train import ON_RAY, losses, run

root, backbone, lose_one = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "lose one"


def on_step(step):
    context = ray.train.get_context()
    (root / f"node-{ray.get_runtime_context().get_node_id()}").touch()
    (root / f"step-{step}-of-{context.get_world_size()}").touch()
    if lose_one and context.get_world_size() == 2:
        time.sleep(1)  # so that the node is lost before the end


node = dict(num_cpus=1, object_store_memory=128 * 2**20)
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
other = cluster.add_node(**node)
ray.init(address=cluster.address, log_to_driver=False)
config = replace(ON_RAY, cpus_per_worker=1.0, min_workers=1 if lose_one else None, max_failures=3)
found = []


def train():
    found.append(losses(run(root / "runs", backbone, config, on_step=on_step)))


training = threading.Thread(target=train)  # an error in it is printed, and nothing found
training.start()
while lose_one and training.is_alive() and not (root / "step-5-of-2").exists():
    time.sleep(0.1)
if lose_one:
    cluster.remove_node(other, allow_graceful=False)
training.join()
(root / "losses.json").write_text(json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""
SOON = {  # that a node is lost
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


def on_two_nodes(folder: Path, backbone: Path, what: str) -> list[float]:
    """The losses; `folder` then holds a file for each node that trained, and for each step and number of workers."""
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_NODES, str(folder), str(backbone), what],
        cwd=ROOT,
        env={**os.environ, **SOON, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[float]] = json.loads((folder / "losses.json").read_text())
    assert found, done.stderr[-3000:]
    return found[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_on_two_nodes_give_the_losses_of_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    alone = losses(run(tmp_path / "alone", tiny_llama, CONFIG))
    assert on_two_nodes(tmp_path, tiny_llama, "keep both") == pytest.approx(alone, rel=1e-5)
    assert len(list(tmp_path.glob("node-*"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lost_node_leaves_training_to_the_other(tiny_llama: Path, tmp_path: Path) -> None:
    alone = losses(run(tmp_path / "alone", tiny_llama, CONFIG))
    assert on_two_nodes(tmp_path, tiny_llama, "lose one") == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "step-5-of-2").exists() and not (tmp_path / "step-10-of-2").exists()
    assert (tmp_path / "step-10-of-1").exists()


@pytest.mark.parametrize("bad", [0, 3])
def test_fewer_workers_than_one_or_more_than_all_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"min_workers must be from 1 to num_workers \(2\), got {bad}"):
        TrainConfig(num_workers=2, min_workers=bad)


def test_a_backbone_that_is_sharded_is_loaded_into_main_memory() -> None:
    """A worker's GPU may not hold all of it; one that is frozen stays whole on each."""
    gpu = torch.device("cuda", 1)
    learning = TrainConfig(trainer=TrainerConfig(joint=JointConfig()))
    assert loaded_on(learning, gpu, shard) == torch.device("cpu")
    assert loaded_on(learning, gpu, distributed) == loaded_on(TrainConfig(), gpu, shard) == gpu
