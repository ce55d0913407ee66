"""Leases and steps in an S3 bucket: conditional PUTs, one final PUT, resuming on another machine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from medusa.config import ConfigError
from pipelines.artifact import mirrored_to, open_step
from pipelines.mirror import Mirror, StorageUnavailable
from registry.lease import LEASE_FILE, Holder, Lease, LeaseHeldError, LeaseLostError, ObjectRecord
from registry.object_store import ObjectFolder, ObjectStoreUnavailable


@pytest.fixture
def folder(bucket: str) -> ObjectFolder:
    return ObjectFolder(f"{bucket}/runs")


def opened(root: Path, store: ObjectFolder, rows: int = 3):
    class Opened:
        def __enter__(self):
            self._store = mirrored_to(store)
            self._store.__enter__()
            self._step = open_step(root, "distill", 1, {"rows": rows}, {"prompts": "sha256:p"})
            try:
                return self._step.__enter__()
            except BaseException:
                self._store.__exit__(None, None, None)
                raise

        def __exit__(self, *error):
            try:
                return self._step.__exit__(*error)
            finally:
                self._store.__exit__(None, None, None)

    return Opened()


def expire(folder: ObjectFolder) -> None:
    """As if the holder had been frozen for longer than its lease lasts."""
    holder, etag = ObjectRecord(folder).read()
    assert holder is not None
    assert ObjectRecord(folder).swap(replace(holder, expires=0.0, host="elsewhere"), etag)


def test_a_conditional_write_lands_only_on_what_was_read(folder: ObjectFolder):
    assert folder.read("a") is None
    assert folder.write_if("a", b"1", etag=None)
    assert not folder.write_if("a", b"2", etag=None)
    found = folder.read("a")
    assert found is not None and found.content == b"1"
    assert folder.write_if("a", b"3", etag=found.etag)
    assert not folder.write_if("a", b"4", etag=found.etag)
    assert folder.read("a").content == b"3"  # type: ignore[union-attr]
    assert list(folder.names()) == ["a"]


def test_a_bucket_that_is_not_there_and_a_store_that_is_away_are_told_apart(folder: ObjectFolder, monkeypatch):
    with pytest.raises(ConfigError, match="NoSuchBucket"):
        ObjectFolder("s3://no-such-bucket/x").read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ObjectStoreUnavailable, match="cannot be reached"):
        ObjectFolder(folder.uri).read("a")
    with pytest.raises(ConfigError, match="expected s3://bucket/prefix"):
        ObjectFolder("/tmp/x")


def test_of_many_that_want_a_lease_one_gets_it(folder: ObjectFolder):
    start, wins, refusals = threading.Barrier(6), [], []
    leases = [Lease(ObjectRecord(folder)) for _ in range(6)]

    def contend(lease: Lease) -> None:
        start.wait()
        try:
            lease.acquire()
            wins.append(lease)
        except LeaseHeldError:
            refusals.append(lease)

    threads = [threading.Thread(target=contend, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wins), len(refusals)) == (1, 5)
    wins[0].release()
    leases[0] = Lease(ObjectRecord(folder))
    leases[0].acquire()  # a released lease is free at once
    leases[0].release()


def test_an_expired_lease_is_taken_over_and_its_holder_finds_out(folder: ObjectFolder):
    first, second = Lease(ObjectRecord(folder)), Lease(ObjectRecord(folder))
    first.acquire()
    expire(folder)
    second.acquire()
    with pytest.raises(LeaseLostError, match="was taken over by"), first.while_held():
        pass
    first.release()
    holder, _ = ObjectRecord(folder).read()
    assert holder is not None and holder.owner == second.owner
    second.release()


def test_the_heartbeat_moves_the_end_ahead(folder: ObjectFolder):
    lease = Lease(ObjectRecord(folder), ttl_s=0.6)
    lease.acquire()
    ends = Holder(**json.loads(folder.read(LEASE_FILE).content)).expires  # type: ignore[union-attr]
    deadline = time.monotonic() + 20
    while Holder(**json.loads(folder.read(LEASE_FILE).content)).expires <= ends:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lease.release()


def test_a_complete_step_is_found_on_another_machine(tmp_path: Path, folder: ObjectFolder):
    with opened(tmp_path / "one", folder) as step:
        (step.path / "table").mkdir()
        (step.path / "table" / "part-0").write_text("rows")
        (step.path / "report.json").write_text("{}")
        output = step.commit({"counts": {"written": 3}})
    with opened(tmp_path / "two", folder) as again:
        assert again.complete
        assert again.output.digest == output.digest
        assert (again.path / "table" / "part-0").read_text() == "rows"
    names = list(folder.child(f"distill/{output.path.name}").names())
    assert [name for name in names if name.startswith("work/")] == []
    assert "manifest.json" in names and len([name for name in names if name.startswith("objects/")]) == 2


def test_a_local_manifest_without_one_in_the_store_does_not_count(tmp_path: Path, folder: ObjectFolder):
    with open_step(tmp_path, "distill", 1, {"rows": 3}, {"prompts": "sha256:p"}) as step:
        (step.path / "rows").write_text("rows")
        step.commit({})
    with opened(tmp_path, folder) as step:
        assert not step.complete
        step.commit({}, outputs=["rows"])
    assert ObjectFolder(f"{folder.uri}/distill/{step.path.name}").exists("manifest.json")


def test_a_second_holder_is_refused_wherever_it_is(tmp_path: Path, folder: ObjectFolder):
    with opened(tmp_path / "one", folder):
        with pytest.raises(LeaseHeldError), opened(tmp_path / "two", folder):
            pass


def test_a_killed_holders_work_goes_on_elsewhere(tmp_path: Path, folder: ObjectFolder):
    """SIGKILL after a block was written and sent: the next machine starts with that block."""
    pid = os.fork()
    if pid == 0:
        with opened(tmp_path / "one", folder) as step:
            (step.path / "block-0").write_text("rows")
            (step.path / ".unfinished").write_text("half")
            assert step.mirror is not None
            step.mirror.push_work()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (key,) = {name.split("/")[1] for name in folder.names()}
    expire(folder.child(f"distill/{key}"))
    with opened(tmp_path / "two", folder) as step:
        assert not step.complete
        assert sorted(path.name for path in step.path.iterdir()) == ["block-0"]
        (step.path / "block-1").write_text("more")
        step.commit({})
    assert set(step.output.manifest["outputs"]) == {"block-0", "block-1"}


def test_the_work_of_a_failed_step_is_sent_when_it_ends(tmp_path: Path, folder: ObjectFolder):
    with pytest.raises(RuntimeError, match="no room"), opened(tmp_path / "one", folder) as step:
        (step.path / "block-0").write_text("rows")
        raise RuntimeError("no room")
    with opened(tmp_path / "two", folder) as step:
        assert (step.path / "block-0").read_text() == "rows"
        (step.path / "block-0").unlink()
        assert step.mirror is not None


def test_a_holder_that_was_overtaken_publishes_nothing(tmp_path: Path, folder: ObjectFolder):
    with opened(tmp_path / "one", folder) as slow:
        (slow.path / "rows").write_text("slow")
        expire(folder.child(f"distill/{slow.path.name}"))
        with opened(tmp_path / "two", folder) as quick:
            (quick.path / "rows").write_text("quick")
            output = quick.commit({})
        with pytest.raises(LeaseLostError):
            slow.commit({})
        assert not (slow.path / "manifest.json").exists()
        # Even one that passed its last check before it lost the lease cannot replace what is there.
        with pytest.raises(LeaseLostError, match="was completed by another process"):
            Mirror(folder.child(f"distill/{slow.path.name}"), slow.path).publish(
                {"outputs": {"rows": {"sha256": "0" * 64, "bytes": 4}}}, "{}"
            )
    with opened(tmp_path / "three", folder) as step:
        assert step.output.digest == output.digest
        assert (step.path / "rows").read_text() == "quick"


def test_files_that_are_gone_are_gone_in_the_store(tmp_path: Path, folder: ObjectFolder):
    mirror = Mirror(folder.child("s"), tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    mirror.push_work()
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("changed")
    mirror.push_work()
    assert list(folder.child("s").names()) == ["work/b"]
    assert folder.child("s").read("work/b").content == b"changed"  # type: ignore[union-attr]


def test_a_store_that_is_away_at_the_start_is_a_reason_to_try_again(tmp_path: Path, folder: ObjectFolder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageUnavailable, match="run the same command"):
        with opened(tmp_path, ObjectFolder(folder.uri)):
            pass


def test_a_holder_is_json_that_another_version_can_read(folder: ObjectFolder):
    lease = Lease(ObjectRecord(folder))
    lease.acquire()
    content = json.loads(folder.read(LEASE_FILE).content)  # type: ignore[union-attr]
    assert set(content) == set(asdict(Holder("", None, 0, 0.0)))
    lease.release()
