"""The other processes of a tensor-parallel engine, as its first one sees them: started, told, watched, ended.

A follower is told each pass through a pipe and meets the first process in the pass's sums. One that dies closes its
connections, at which a sum fails at once; one that stands still makes the sum, or the message to it, run out of time;
and one whose first process is gone reads the end of its pipe and exits. Sums inside a CUDA graph have no time to run
out of: there only a dead follower is noticed, and one that stands still by whoever bounds a step (the service does).
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Event, Thread

from medusa.engine.messages import Done, Failed

STEP_TIMEOUT_S = 60.0  # for a sum, or for room in a follower's pipe
START_TIMEOUT_S = 1800.0  # for weights to be read
_LAST_WORDS_S = 2.0  # for a follower's reason to arrive, or its exit to be seen, once a pass has failed
_EXIT_S = 5.0  # for a follower to exit by itself
_WATCH_S = 0.2


class TensorParallelError(RuntimeError):
    """A process of the engine failed or is gone, and the engine with it: start another."""


class Followers:
    """Processes of ranks 1 and up. Once a pass has failed they are gone, and every later call says why."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], connections: Sequence[Connection]) -> None:
        self._processes = processes
        self._connections = connections
        self._failure: str | None = None
        self._closing = Event()
        self._end = weakref.finalize(self, _end, processes, connections, self._closing)

    @classmethod
    def start(cls, count: int) -> Followers:
        processes, connections = [], []
        for _ in range(count):
            own, other = socket.socketpair()
            seconds = int(STEP_TIMEOUT_S) or 1
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0))
            with other:
                processes.append(_spawned(other.fileno()))
            connections.append(Connection(own.detach()))
        return cls(processes, connections)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Raises TensorParallelError if they cannot take another pass."""
        if self._failure is None and any(process.poll() is not None for process in self._processes):
            self._fail("")
        if self._failure is not None:
            raise TensorParallelError(self._failure)

    def send(self, message: object) -> None:
        """To all of them; within `together`."""
        for connection in self._connections:
            connection.send(message)

    def send_each(self, messages: Sequence[object]) -> None:
        for connection, message in zip(self._connections, messages, strict=True):
            connection.send(message)

    def expect_done(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits until each has answered; within `together`."""
        deadline = time.monotonic() + timeout_s
        for index, (process, connection) in enumerate(zip(self._processes, self._connections, strict=True), start=1):
            while not connection.poll(0.1):
                if process.poll() is not None:
                    raise EOFError(f"rank {index} exited with {process.returncode}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {index} has not answered for {timeout_s:.0f} s")
            answer = connection.recv()
            if not isinstance(answer, Done):
                raise EOFError(f"rank {index}: {answer.reason}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what they do at the same time as this process. An error in it leaves them where nobody can tell, so
        it ends them, and is raised as a TensorParallelError that names what a follower said."""
        self.check()
        try:
            yield
        except TensorParallelError:
            raise
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")
            if isinstance(error, Exception):
                raise TensorParallelError(self._failure) from error
            raise

    def watch(self, broken: Callable[[], None]) -> None:
        """Calls `broken` from a thread of its own when one of them is gone before `close`. A CPU that waits in a sum
        is told by the connection; for a GPU, which is not, somebody has to break the sum off."""
        Thread(target=_watch, args=(self._processes, self._closing, broken), daemon=True).start()

    def close(self) -> None:
        """Ends them; they read the end of their pipes. Later passes are refused."""
        self._failure = self._failure or "the engine is closed"
        self._end()

    def _fail(self, own_reason: str) -> None:
        reason = self._last_words() or own_reason
        self._failure = f"tensor parallelism has ended, and this engine with it; start another one\ncause: {reason}"
        for process in self._processes:
            process.kill()
        _end(self._processes, self._connections, Event())  # whoever watches them may still break sums off

    def _last_words(self) -> str | None:
        """What the follower that failed says of it, or its exit status; None where none has failed."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline:
            for index, (process, connection) in enumerate(zip(self._processes, self._connections, strict=True), 1):
                if (said := _failure_in(connection)) is not None:
                    return f"rank {index}: {said}"
                if (status := process.poll()) is not None:
                    return f"rank {index} (process {process.pid}) exited with status {status}"
            time.sleep(0.02)
        return None


def _failure_in(connection: Connection) -> str | None:
    try:
        while connection.poll():
            if isinstance(answer := connection.recv(), Failed):
                return answer.reason
    except (EOFError, OSError):  # it is gone; its exit status tells
        pass
    return None


def _spawned(descriptor: int) -> subprocess.Popen[bytes]:
    """A process of its own, which needs nothing of this one's main module, and is in a session of its own: an interrupt
    from the keyboard is for the first process to handle."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "medusa.engine.follower", str(descriptor)],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )


def _watch(processes: Sequence[subprocess.Popen[bytes]], closing: Event, broken: Callable[[], None]) -> None:
    while not closing.wait(_WATCH_S):
        if any(process.poll() is not None for process in processes):
            broken()
            return


def _end(processes: Sequence[subprocess.Popen[bytes]], connections: Sequence[Connection], closing: Event) -> None:
    closing.set()
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + _EXIT_S
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
