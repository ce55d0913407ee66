"""Ray for one command: the cluster of RAY_ADDRESS, or an embedded one that ends with the command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

MIN_CPUS = 4  # fewer logical CPUs make Ray Train with its controller wait for ever


@contextmanager
def ray_cluster(min_cpus: int = MIN_CPUS) -> Iterator[None]:
    """Connects or starts (with `min_cpus` logical CPUs at least), and leaves or stops only what it started.

    An embedded Ray listens on this machine alone and is gone with the command, so it needs no token and sends no
    usage statistics unless the environment says otherwise.
    """
    import ray
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights" between our own bars
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan and its own progress: ours is on the bars
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(min_cpus, os.cpu_count() or 1),
            object_store_memory=2**30,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()
