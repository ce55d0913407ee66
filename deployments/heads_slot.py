"""The heads of a running replica: verified before they serve, replaced between two steps, kept when others fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.async_engine import AsyncEngine
from deployments.config import HeadsConfig
from deployments.streams import HeadsVersion
from medusa.checkpoint import Checkpoint, CheckpointError, CheckpointMismatchError, load_checkpoint
from medusa.config import ConfigError, validate
from medusa.digests import directory_digest
from medusa.model import Backbone

logger = logging.getLogger(__name__)


def verified(config: HeadsConfig) -> HeadsVersion:
    """What will be served. Raises CheckpointError for a missing folder, CheckpointMismatchError for another digest."""
    if config.heads is None:
        return HeadsVersion()
    folder = Path(config.heads)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    digest = directory_digest(folder)
    if config.heads_digest not in (None, digest):
        raise CheckpointMismatchError(
            f"{folder} has the digest {digest}, but {config.heads_digest} was to be served; "
            "fetch the registered version again"
        )
    return HeadsVersion(config.heads_version, digest)


class HeadsSlot:
    """One change at a time; the same heads again change nothing."""

    def __init__(self, engine: AsyncEngine, backbone: Backbone) -> None:
        self._engine = engine
        self._backbone = backbone
        self._turn = asyncio.Lock()

    async def take_config(self, user_config: Mapping[str, Any]) -> None:
        """`take` for what an operator wrote; what is no such configuration counts as heads that failed."""
        try:
            config = validate(HeadsConfig, user_config, source="user_config")
        except ConfigError as error:
            logger.error("user_config is refused, the heads %s stay: %s", self._engine.heads, error)
            self._engine.heads_failed(HeadsVersion(), "the deployment's user_config is not valid; its log has more")
            return
        await self.take(config)

    async def take(self, config: HeadsConfig) -> None:
        """Requests get these heads from now on, or, where that fails, go on with those they got, which /health tells.

        Raises EngineUnavailable.
        """
        async with self._turn:
            try:
                await self._take(config)
            except (CheckpointError, OSError, ValueError) as error:
                wanted = HeadsVersion(config.heads_version, config.heads_digest)
                logger.error("heads %s could not be taken, %s stay: %s", wanted, self._engine.heads, error)
                self._engine.heads_failed(wanted, _public(error))

    async def _take(self, config: HeadsConfig) -> None:
        wanted = await asyncio.to_thread(verified, config)
        if wanted == self._engine.heads:
            self._engine.heads_kept()
            return
        if config.heads is None:
            raise CheckpointError("heads cannot be taken away from a running replica; redeploy without them")
        checkpoint = await asyncio.to_thread(self._load, Path(config.heads))
        await self._engine.swap_heads(checkpoint, wanted)
        logger.warning("requests get the heads %s from now on", wanted)

    def _load(self, folder: Path) -> Checkpoint:
        return load_checkpoint(folder, self._backbone)


def _public(error: Exception) -> str:
    """What a client may read: the kind of failure. Paths and digests are in the log."""
    return {
        "CheckpointMismatchError": "the checkpoint is not the one that was to be served, or not for this backbone",
        "CheckpointError": "the checkpoint is missing, damaged or unsafe",
    }.get(type(error).__name__, "the checkpoint could not be read or does not fit the engine")
