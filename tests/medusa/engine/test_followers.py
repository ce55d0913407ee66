"""Followers that die, stand still or fail end the engine with a reason, and die with its process; nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from threading import Event, Timer

import pytest
import torch

from medusa import Engine, SamplingParams, TensorParallelError
from medusa.engine import followers as followers_module
from medusa.engine.followers import Followers
from medusa.engine.messages import Move, on_host
from medusa.engine.sharded import load_sharded
from medusa.parallel import ShardingError
from medusa.quantization import QuantizationError
from tests.medusa.engine.support import greedy, wait_until_gone

PROMPTS = [[5, 6, 7], [8, 9]]
LONG = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)


def engine_of(path) -> Engine:
    return Engine.from_pretrained(path, device="cpu", speculation="off", tensor_parallel=2)


def assert_sick(engine, pids, cause) -> None:
    """The first call tells the cause, later ones too; the followers are gone."""
    for _ in range(2):
        with pytest.raises(TensorParallelError, match=cause):
            engine.generate(PROMPTS, LONG)
        assert not engine.has_unfinished()
    assert wait_until_gone(pids)
    engine.close()


def test_a_follower_killed_while_the_others_wait_for_its_part_of_a_sum(tiny_llama):
    engine = engine_of(tiny_llama)
    pids = engine.backbone.followers.pids
    engine.add(PROMPTS[0], LONG, request_id="long")
    for _ in range(5):
        engine.step()
    os.kill(pids[0], signal.SIGSTOP)
    killer = Timer(1.0, os.kill, (pids[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(TensorParallelError, match="rank 1 .* exited with status -9"):
        while engine.has_unfinished():
            engine.step()
    killer.join()
    engine.abort("long")
    assert_sick(engine, pids, "exited with status -9")


def test_a_watched_follower_that_dies():
    """As a GPU's process needs it, which nobody else tells."""
    gone = Event()
    followers = Followers.start(1)
    followers.watch(gone.set)
    os.kill(followers.pids[0], signal.SIGKILL)
    assert gone.wait(30)
    with pytest.raises(TensorParallelError, match="exited with status -9"):
        followers.check()
    followers.close()


@pytest.mark.slow
def test_a_follower_that_stands_still(tiny_llama, monkeypatch):
    monkeypatch.setattr("medusa.engine.sharded.STEP_TIMEOUT_S", 3.0)
    engine = engine_of(tiny_llama)
    pids = engine.backbone.followers.pids
    engine.generate(PROMPTS, greedy())
    os.kill(pids[0], signal.SIGSTOP)
    assert_sick(engine, pids, "(?i)timed out|timeout")


@pytest.mark.slow
def test_a_follower_whose_step_raises(tiny_llama):
    engine = engine_of(tiny_llama)
    followers = engine.backbone.followers
    nowhere = on_host(torch.full((2, 1, 1), 10**6))
    followers.send(Move(nowhere, nowhere))
    with pytest.raises(ShardingError, match=r"has a torch.distributed group"):
        load_sharded(tiny_llama, 2, device="cpu")  # one group a process: refused, and the engine is none the worse
    assert_sick(engine, followers.pids, "rank 1: IndexError|rank 1 .* exited with status 1")


SCRIPT = """
import os, signal, sys
from medusa import Engine
engine = Engine.from_pretrained(sys.argv[1], device="cpu", speculation="off", tensor_parallel=2)
print(*engine.backbone.followers.pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_followers_do_not_outlive_the_first_process(tiny_llama):
    """A script without a guard around its main part, killed: the followers read the end of their pipe."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tiny_llama)], stdout=subprocess.PIPE, timeout=120)
    assert run.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 1
    assert wait_until_gone(pids)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", None])
def test_numbers_that_are_none_of_processes(tiny_llama, count):
    with pytest.raises(ValueError, match="tensor_parallel is a number of processes from 1 on"):
        Engine.from_pretrained(tiny_llama, device="cpu", tensor_parallel=count)


def test_what_cannot_be_shared_out_is_refused_before_anything_starts(make_backbone_dir, tiny_llama, monkeypatch):
    monkeypatch.setattr(followers_module.subprocess, "Popen", None)
    for family, size, message in (
        ("llama", 3, "llama has num_attention_heads=4, which tensor_parallel=3 does not divide"),
        ("llama", 4, "llama has num_key_value_heads=2, which tensor_parallel=4 does not divide"),
        ("gpt2", 2, "gpt2 has no tensor-parallel plan"),
    ):
        with pytest.raises(ShardingError, match=message):
            Engine.from_pretrained(make_backbone_dir(family), device="cpu", tensor_parallel=size)
    with pytest.raises(QuantizationError, match="tensor_parallel=2 do not go together"):
        Engine.from_pretrained(tiny_llama, device="cpu", tensor_parallel=2, quantization="int8")
    with pytest.raises(ShardingError, match="first GPUs that are visible"):
        Engine.from_pretrained(tiny_llama, device="cuda:1", tensor_parallel=2)
    with pytest.raises(ShardingError, match="one of the devices"):
        Engine.from_pretrained(tiny_llama, device="meta", tensor_parallel=2)


def test_a_follower_that_does_not_come_up(tiny_llama, monkeypatch):
    """That it is gone is told at once: it is not waited for."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TensorParallelError, match="rank 1 .*exited with status 1"):
        load_sharded(tiny_llama, 2, device="cpu")
