"""A lease: one holder at a time, which survives kills by expiring.

A record names the holder and when its hold ends; a heartbeat thread moves the end ahead. Whoever finds it expired
takes it over, by a write that succeeds only if the record is still as it was read, so two processes never both win.

Where the record is: a file (`FileRecord`: every change happens under a kernel lock held for that moment only, so work
done `while_held` cannot land after another holder has taken over), an object of an S3 bucket (`ObjectRecord`:
conditional PUT), or a Lease of Kubernetes (deployments/kubernetes.py). The latter two have no such lock: there
`while_held` renews the hold first, and what is done within it must be harmless if it lands late. `owner` is the
fencing token: no two holds share one.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from registry.object_store import ObjectFolder

LEASE_FILE, LOCK_FILE = "lease.json", "lease.lock"
DEFAULT_TTL_S = 60.0


class TryAgain(RuntimeError):
    """Nothing is wrong with the input: the same command may succeed later (exit code 4)."""


class LeaseHeldError(TryAgain):
    """Another process works on this."""


class LeaseLostError(TryAgain):
    """This process held the lease, but let it expire and another took it over; its result is not kept."""


@dataclass(frozen=True)
class Holder:
    """`host` is None where processes of this machine cannot be told apart."""

    owner: str  # host:pid:uuid, which is also the fencing token: a takeover always writes another one
    host: str | None
    pid: int
    expires: float  # seconds since the epoch

    def is_over(self) -> bool:
        return self.expires <= time.time() or self._is_dead()

    def _is_dead(self) -> bool:
        """True only for a process of this very machine that has ended: no need to wait for the expiry."""
        if self.host is None or self.host != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Record(Protocol):
    """Where one Holder is kept. A version is whatever tells that the record has changed; None: there is none."""

    where: str  # for messages

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else changes the record within, where storage has such a thing; else does nothing."""
        ...

    def read(self) -> tuple[Holder | None, Any]: ...

    def swap(self, holder: Holder, version: Any) -> bool:
        """Writes it if the record still has this version; False if it has another."""
        ...

    def clear(self, version: Any) -> None: ...


class Lease:
    """Held from `acquire` to `release`; renewed in between by a thread of its own."""

    def __init__(self, record: Record | Path, *, ttl_s: float = DEFAULT_TTL_S) -> None:
        self._record = FileRecord(record) if isinstance(record, Path) else record
        self._ttl_s = ttl_s
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def acquire(self) -> None:
        with self._record.locked():
            holder, version = self._record.read()
            if (holder is not None and not holder.is_over()) or not self._record.swap(self._hold(), version):
                raise LeaseHeldError(self._described(holder or self._record.read()[0]))
        self._heartbeat = threading.Thread(target=self._beat, name=f"lease {self.owner}", daemon=True)
        self._heartbeat.start()

    def release(self) -> None:
        """Ends the hold; does nothing to a lease that another has taken over."""
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        with self._record.locked():
            holder, version = self._record.read()
            if holder is not None and holder.owner == self.owner:
                self._record.clear(version)

    @contextmanager
    def while_held(self) -> Iterator[None]:
        """A moment in which this process is the holder; LeaseLostError if another has taken over."""
        with self._record.locked():
            holder, version = self._record.read()
            if holder is None or holder.owner != self.owner or not self._record.swap(self._hold(), version):
                raise LeaseLostError(
                    f"the lease of {self.owner} on {self._record.where} expired and was taken over by "
                    f"{holder.owner if holder else 'a holder now gone'}; this result is dropped, try again"
                )
            yield

    def _beat(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            try:
                with self._record.locked():
                    holder, version = self._record.read()
                    if holder is None or holder.owner != self.owner:
                        return  # `while_held` reports it
                    self._record.swap(self._hold(), version)
            except (OSError, TryAgain):
                continue  # storage hiccup: the hold lasts until its expiry, the next beat tries again

    def _hold(self) -> Holder:
        return Holder(self.owner, _machine(), os.getpid(), time.time() + self._ttl_s)

    def _described(self, holder: Holder | None) -> str:
        if holder is None:
            return f"another process took {self._record.where} at this moment; try again later"
        left_s = holder.expires - time.time()
        return (
            f"{self._record.where} is being worked on by {holder.owner}, whose lease ends in "
            f"{left_s:.0f} s unless renewed; wait for that run, or try again later"
        )


class FileRecord:
    """`lease.json` in a folder."""

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._path, self._lock_path = directory / LEASE_FILE, directory / LOCK_FILE

    @contextmanager
    def locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # which unlocks, as a kill does

    def read(self) -> tuple[Holder | None, Any]:
        try:
            return Holder(**json.loads(self._path.read_text())), True
        except FileNotFoundError:
            return None, None
        except (json.JSONDecodeError, TypeError):  # its writer was killed halfway: we hold the lock
            self._path.unlink()
            return None, None

    def swap(self, holder: Holder, version: Any) -> bool:  # the lock keeps the version
        partial = self._path.with_name(f".{LEASE_FILE}.{holder.owner.rpartition(':')[2]}")
        partial.write_text(json.dumps(asdict(holder)))
        os.replace(partial, self._path)
        return True

    def clear(self, version: Any) -> None:
        self._path.unlink()


class ObjectRecord:
    """`lease.json` in a folder of an object store; its version is the ETag."""

    def __init__(self, folder: ObjectFolder) -> None:
        self.where = folder.uri
        self._folder = folder

    def locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self) -> tuple[Holder | None, Any]:
        found = self._folder.read(LEASE_FILE)
        return (None, None) if found is None else (Holder(**json.loads(found.content)), found.etag)

    def swap(self, holder: Holder, version: Any) -> bool:
        return self._folder.write_if(LEASE_FILE, json.dumps(asdict(holder)).encode(), etag=version)

    def clear(self, version: Any) -> None:
        """Written as expired: a DELETE has no condition that every store knows."""
        self._folder.write_if(LEASE_FILE, json.dumps(asdict(Holder("nobody", None, 0, 0.0))).encode(), etag=version)


def _machine() -> str | None:
    """Names the boot and process namespace, in which process ids are unambiguous."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
