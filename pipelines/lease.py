"""A lease on a folder: one holder at a time, which survives kills by expiring.

`lease.json` names the holder and when its hold ends; a heartbeat thread moves the end ahead. Whoever finds it
expired takes it over. Every change of the file happens under a kernel lock held for that moment only, so two
processes never both win, and work done `while_held` cannot land after another holder has taken over.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

LEASE_FILE, LOCK_FILE = "lease.json", "lease.lock"
DEFAULT_TTL_S = 60.0


class TryAgain(RuntimeError):
    """Nothing is wrong with the input: the same command may succeed later (exit code 4)."""


class LeaseHeldError(TryAgain):
    """Another process works on this folder."""


class LeaseLostError(TryAgain):
    """This process held the lease, but let it expire and another took it over; its result is not kept."""


@dataclass(frozen=True)
class Holder:
    """The content of lease.json. `host` is None where processes of this machine cannot be told apart."""

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


class Lease:
    """Held from `acquire` to `release`; renewed in between by a thread of its own."""

    def __init__(self, directory: Path, *, ttl_s: float = DEFAULT_TTL_S) -> None:
        self._path, self._lock_path = directory / LEASE_FILE, directory / LOCK_FILE
        self._ttl_s = ttl_s
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def acquire(self) -> None:
        with self._locked():
            holder = self._read()
            if holder is None:
                self._create()
            elif holder.is_over():
                self._replace()
            else:
                left_s = holder.expires - time.time()
                raise LeaseHeldError(
                    f"{self._path.parent} is being worked on by {holder.owner}, whose lease ends in "
                    f"{left_s:.0f} s unless renewed; wait for that run, or try again later"
                )
        self._heartbeat = threading.Thread(target=self._beat, name=f"lease {self.owner}", daemon=True)
        self._heartbeat.start()

    def release(self) -> None:
        """Ends the hold; does nothing to a lease that another has taken over."""
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        with self._locked():
            if self._is_ours():
                self._path.unlink()

    @contextmanager
    def while_held(self) -> Iterator[None]:
        """A moment in which no other process can take the lease over; LeaseLostError if one already has."""
        with self._locked():
            if not self._is_ours():
                holder = self._read()
                raise LeaseLostError(
                    f"the lease of {self.owner} on {self._path.parent} expired and was taken over by "
                    f"{holder.owner if holder else 'a holder now gone'}; this result is dropped, try again"
                )
            yield

    def _beat(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            try:
                with self._locked():
                    if not self._is_ours():
                        return  # `while_held` reports it
                    self._replace()
            except OSError:
                continue  # storage hiccup: the hold lasts until its expiry, the next beat tries again

    def _is_ours(self) -> bool:
        holder = self._read()
        return holder is not None and holder.owner == self.owner

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, TypeError):  # its writer was killed halfway: we hold the lock
            self._path.unlink()
            return None

    def _content(self) -> bytes:
        holder = Holder(self.owner, _machine(), os.getpid(), time.time() + self._ttl_s)
        return json.dumps(asdict(holder)).encode()

    def _create(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._content())

    def _replace(self) -> None:
        partial = self._path.with_name(f".{LEASE_FILE}.{self.owner.rpartition(':')[2]}")
        partial.write_bytes(self._content())
        partial.replace(self._path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # which unlocks, as a kill does


def _machine() -> str | None:
    """Names the boot and process namespace, in which process ids are unambiguous."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
