"""The service with engines that wait after their first step: for tests of what becomes of replies that run.

An engine waits while the folder `hold_of(model)` is there, and leaves a file in it, named by its process.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from deployments import loading, server
from medusa import Engine
from tests.deployments.sick_server import app_of


def hold_of(model: str | Path) -> Path:
    return Path(f"{model}.hold")


class HeldEngine(Engine):
    hold: Path

    def step(self) -> list[Any]:
        if self.stats().steps and self.hold.exists():
            (self.hold / str(os.getpid())).touch()
            while self.hold.exists():
                time.sleep(0.02)
        return super().step()


class MedusaServer(server.MedusaServer.func_or_class.__mro__[1]):
    async def reconfigure(self, user_config: Any) -> None:
        HeldEngine.hold = hold_of(self._config.model)
        loading.Engine = HeldEngine
        await super().reconfigure(user_config)


def build_app(args: dict[str, Any]) -> Any:
    return app_of(MedusaServer, args)
