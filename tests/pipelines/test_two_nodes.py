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
from pipelines.train import TrainConfig
from pipelines.train_worker import distributed, loaded_on
from tests.pipelines.test_train import CONFIG, losses, run

ROOT = Path(__file__).parents[2]
ON_TWO_NODES = """
import sys
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.pipelines.test_train import ON_RAY, losses, run

root, backbone = map(Path, sys.argv[1:])


def on_step(step):
    (root / f"node-{ray.get_runtime_context().get_node_id()}").touch()


node = dict(num_cpus=1, object_store_memory=128 * 2**20)
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
cluster.add_node(**node)
ray.init(address=cluster.address, log_to_driver=False)
try:
    print(losses(run(root / "runs", backbone, replace(ON_RAY, cpus_per_worker=1.0), on_step=on_step)))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_workers_on_two_nodes_give_the_losses_of_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    alone = losses(run(tmp_path / "alone", tiny_llama, CONFIG))
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_NODES, str(tmp_path), str(tiny_llama)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("node-*"))) == 2
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(alone, rel=1e-5)


def test_a_backbone_that_is_sharded_is_loaded_into_main_memory() -> None:
    """A worker's GPU may not hold all of it; one that is frozen stays whole on each."""
    gpu = torch.device("cuda", 1)
    learning = TrainConfig(trainer=TrainerConfig(joint=JointConfig()))
    assert loaded_on(learning, gpu, shard) == torch.device("cpu")
    assert loaded_on(learning, gpu, distributed) == loaded_on(TrainConfig(), gpu, shard) == gpu
