"""The replicas of this session's own cluster: its processes are this process's children."""

from __future__ import annotations

import psutil


def replica_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return sorted(child.pid for child in children if "ServeReplica:medusa" in " ".join(_command_of(child)))


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # gone since, or not yet waited for
        return []
