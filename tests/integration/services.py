"""Real services on this machine, started by the tests on free ports in folders of their own, and ended by their pid."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest


def missing(what: str) -> None:
    """Skips the test, or fails it where REQUIRE_SERVICES=1 says that everything must be here."""
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what} is missing, and REQUIRE_SERVICES=1 asks for it")
    pytest.skip(f"{what} is not installed")


def program(name: str, *folders: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if found is None:
        missing(name)
    return str(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, what: str = "the condition") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {seconds:.0f} s")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(
    command: Sequence[str], port: int, folder: Path, *, env: dict[str, str] | None = None, user: str | None = None
) -> Iterator[Running]:
    """The command, once it listens on `port`, until the block ends."""
    log = folder / f"{Path(command[0]).name}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            user=user,
            group=pwd.getpwnam(user).pw_gid if user else None,
            extra_groups=[] if user else None,
        )
    service = Running(process, port, log)
    try:
        wait_until(lambda: process.poll() is not None or listens(port), 60, f"{command[0]} listening on {port}")
        assert process.poll() is None, log.read_text()
        yield service
    finally:
        service.stop()


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The URL of moto's server, an S3 that answers over HTTP."""
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, folder):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """postgresql:// address of an empty database. PostgreSQL refuses to run as root: there another user runs it."""
    bins = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    initdb, postgres = program("initdb", *bins), program("postgres", *bins)
    postgres = str(Path(postgres).resolve())
    user = None
    if os.geteuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _is_user(name)), None)
        if user is None:
            missing("a user other than root for PostgreSQL")
    data = folder / "data"
    data.mkdir()
    if user is not None:
        shutil.chown(data, user)
        for parent in [folder, *folder.parents]:
            if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)  # to pass through
    made = subprocess.run(
        [str(Path(initdb).resolve()), "-D", str(data), "-U", "mlflow", "-A", "trust", "--no-sync"],
        capture_output=True,
        text=True,
        user=user,
        extra_groups=[] if user else None,
        cwd="/",
    )
    assert made.returncode == 0, made.stderr
    port = free_port()
    command = [postgres, "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(data), "-F"]
    with running(command, port, folder, user=user):
        address = f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        wait_until(lambda: _accepts(address), 60, "PostgreSQL")
        yield address


def _accepts(address: str) -> bool:
    import psycopg2

    try:
        psycopg2.connect(address).close()
    except psycopg2.OperationalError:
        return False
    return True


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


@contextmanager
def redis_server(folder: Path) -> Iterator[Running]:
    port = free_port()
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with running(command, port, folder) as service:
        yield service


@contextmanager
def mlflow_server(folder: Path, store: str, artifacts: str, env: dict[str, str]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", artifacts]
    with running(command, port, folder, env=env):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _is_well(url), 120, "MLflow")
        yield url


def _is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
