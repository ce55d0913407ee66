from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.artifact import StepOutput, open_step, read_output, step_key
from registry.lease import FileRecord, Lease, LeaseHeldError, LeaseLostError, TryAgain


@dataclass(frozen=True)
class Config:
    rows: int = 3
    name: str = "a"


def opened(root: Path, config: Config = Config(), version: int = 1, **inputs: str):
    return open_step(root, "distill", version, config, inputs or {"prompts": "sha256:p"})


def write_and_commit(root: Path, text: str = "rows") -> StepOutput:
    with opened(root) as step:
        (step.path / "table").mkdir(exist_ok=True)
        (step.path / "table" / "part-0").write_text(text)
        (step.path / "report.json").write_text("{}")
        return step.commit({"counts": {"written": 3}})


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a forked process that does `work`; its exit code is 4 when it raises TryAgain."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except TryAgain:
            os._exit(4)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_the_key_changes_with_whatever_decides_the_output():
    keys = {
        step_key("distill", 1, Config(), {"prompts": "a"}),
        step_key("train", 1, Config(), {"prompts": "a"}),
        step_key("distill", 2, Config(), {"prompts": "a"}),
        step_key("distill", 1, Config(rows=4), {"prompts": "a"}),
        step_key("distill", 1, Config(), {"prompts": "b"}),
    }
    assert len(keys) == 5 and all(len(key) == 64 for key in keys)
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert step_key("s", 1, {"x": 1, "y": (1, 2)}, one) == step_key("s", 1, {"y": [1, 2], "x": 1}, other)


def test_a_committed_step_is_complete_and_tells_what_it_holds(tmp_path: Path):
    output = write_and_commit(tmp_path)
    assert output.path == tmp_path / "distill" / output.key[:16]
    assert set(output.manifest["outputs"]) == {"table/part-0", "report.json"}
    assert output.manifest["outputs"]["report.json"]["bytes"] == 2
    assert output.manifest["counts"] == {"written": 3}
    assert output.manifest["config"] == {"rows": 3, "name": "a"}
    assert output.manifest["inputs"] == {"prompts": "sha256:p"}
    assert sorted(p.name for p in output.path.iterdir()) == ["lease.lock", "manifest.json", "report.json", "table"]

    with opened(tmp_path) as step:
        assert step.complete and step.output == output
        with pytest.raises(ValueError, match="read only"):
            step.commit({})
    assert read_output(output.path) == output
    with opened(tmp_path, Config(rows=4)) as other:
        assert not other.complete and other.path != output.path


def test_the_digest_of_a_step_is_that_of_its_content(tmp_path: Path):
    first, second = write_and_commit(tmp_path / "a"), write_and_commit(tmp_path / "b")
    assert first.digest == second.digest
    assert write_and_commit(tmp_path / "c", text="other").digest != first.digest


def test_outputs_may_be_named_and_must_exist(tmp_path: Path):
    with opened(tmp_path) as step:
        (step.path / "scratch").mkdir()
        (step.path / "scratch" / "state").write_text("x")
        (step.path / "result").write_text("y")
        with pytest.raises(FileNotFoundError, match="missing was to be committed"):
            step.commit({}, outputs=["missing"])
        with pytest.raises(ValueError, match=r"\['inputs'\] are written by commit"):
            step.commit({"inputs": {}})
        assert not step.complete
        assert set(step.commit({}, outputs=["result"]).manifest["outputs"]) == {"result"}


def test_an_interrupted_step_is_kept_and_resumed(tmp_path: Path):
    with pytest.raises(RuntimeError, match="killed"), opened(tmp_path) as step:
        (step.path / "block-0").write_text("done")
        raise RuntimeError("killed")
    with opened(tmp_path) as step:
        assert not step.complete
        assert (step.path / "block-0").read_text() == "done"


def test_a_kill_before_the_rename_leaves_an_incomplete_step(tmp_path: Path):
    """A real SIGKILL between writing the manifest and moving it into place."""

    def killed() -> None:
        Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
        write_and_commit(tmp_path)

    assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL
    [folder] = (tmp_path / "distill").iterdir()
    assert len(list(folder.glob(".manifest.json.*.partial"))) == 1
    assert (folder / "lease.json").exists()

    with opened(tmp_path) as step:  # at once: the holder is known to be dead
        assert not step.complete
        assert set(step.commit({}).manifest["outputs"]) == {"table/part-0", "report.json"}


def test_a_second_holder_is_refused_until_the_first_ends(tmp_path: Path):
    with opened(tmp_path) as step:
        lease = json.loads((step.path / "lease.json").read_text())
        with pytest.raises(LeaseHeldError, match=lease["owner"]) as error, opened(tmp_path):
            pass
        assert isinstance(error.value, TryAgain)
        assert os.waitstatus_to_exitcode(in_child(lambda: opened(tmp_path).__enter__())) == 4
        assert json.loads((step.path / "lease.json").read_text())["owner"] == lease["owner"]
    with opened(tmp_path) as step:
        assert not step.complete


def test_the_step_completed_by_another_while_waiting_for_the_lease_is_taken(tmp_path: Path, monkeypatch):
    def acquire_late(self: Lease) -> None:
        monkeypatch.undo()
        write_and_commit(tmp_path)
        self.acquire()

    monkeypatch.setattr(Lease, "acquire", acquire_late)
    with opened(tmp_path) as step:
        assert step.complete


def test_the_heartbeat_keeps_a_lease_beyond_its_expiry(tmp_path: Path):
    holder, other = Lease(tmp_path, ttl_s=0.3), Lease(tmp_path)
    holder.acquire()
    ends = json.loads((tmp_path / "lease.json").read_text())["expires"]
    wait_until(lambda: time.time() > ends)
    with pytest.raises(LeaseHeldError):
        other.acquire()
    with holder.while_held():
        pass
    holder.release()
    other.acquire()
    other.release()
    assert not (tmp_path / "lease.json").exists()


def test_an_expired_lease_is_taken_over_and_its_holder_cannot_commit(tmp_path: Path):
    with opened(tmp_path) as step:
        assert step.lease is not None
        (step.path / "rows").write_text("rows")
        expire(step.path)
        with opened(tmp_path) as successor:
            assert not successor.complete
            with pytest.raises(LeaseLostError, match=r"expired and was taken over by"):
                step.ensure_held()
            with pytest.raises(LeaseLostError):
                step.commit({})
            assert not (step.path / "manifest.json").exists()
            output = successor.commit({"counts": {"by": 2}})
        with pytest.raises(LeaseLostError, match="a holder now gone"):
            step.commit({})
    with opened(tmp_path) as step:
        assert step.output == output


def test_the_loser_leaves_the_winners_lease_alone(tmp_path: Path):
    loser, winner = Lease(tmp_path), Lease(tmp_path)
    loser.acquire()
    expire(tmp_path)
    winner.acquire()
    loser.release()
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] == winner.owner
    winner.release()


def test_of_many_that_find_an_expired_lease_one_wins(tmp_path: Path, monkeypatch):
    Lease(tmp_path).acquire()
    expire(tmp_path)
    read = FileRecord.read

    def read_slowly(self: FileRecord):
        holder = read(self)
        time.sleep(0.02)  # time for the others to read the same
        return holder

    monkeypatch.setattr(FileRecord, "read", read_slowly)
    start, wins, refusals = threading.Barrier(8), [], []

    def contend() -> None:
        lease = Lease(tmp_path)
        start.wait()
        try:
            lease.acquire()
            wins.append(lease)
        except LeaseHeldError:
            refusals.append(lease)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wins), len(refusals)) == (1, 7)
    wins[0].release()


def test_a_lease_cut_off_by_a_kill_is_taken_over(tmp_path: Path):
    (tmp_path / "lease.json").write_text('{"owner": "a:1')
    lease = Lease(tmp_path)
    lease.acquire()
    lease.release()


def test_another_machines_lease_is_not_judged_by_process_ids(tmp_path: Path):
    lease = Lease(tmp_path)
    lease.acquire()
    content = json.loads((tmp_path / "lease.json").read_text())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "lease.json").write_text(json.dumps({**content, "pid": dead.pid, "host": "elsewhere"}))
    with pytest.raises(LeaseHeldError):
        Lease(tmp_path).acquire()
    (tmp_path / "lease.json").write_text(json.dumps({**content, "pid": dead.pid}))
    successor = Lease(tmp_path)
    if content["host"] is not None:
        successor.acquire()
        successor.release()
    lease.release()


def expire(folder: Path) -> None:
    """As if the holder had been frozen for longer than its lease lasts."""
    path = folder / "lease.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expires": 0}))


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("waited 10 s")


def test_the_heartbeat_ends_with_the_lease(tmp_path: Path):
    before = threading.active_count()
    with opened(tmp_path, version=7):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert os.listdir(tmp_path / "distill")
