"""The service with an engine that breaks when it is told to: for the test that it is replaced.

A replica unpickles its class by this module's name, and so comes to run what stands here.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from deployments import loading, server
from medusa import Engine

TRIGGER = "make sick"


class BreakableEngine(Engine):
    is_broken = False

    def add(self, prompt: Any, params: Any, *, request_id: str | None = None) -> str:
        self.is_broken |= list(prompt) == self.tokenizer.encode(TRIGGER)
        return super().add(prompt, params, request_id=request_id)

    def step(self) -> list[Any]:
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().step()


class MedusaServer(server.MedusaServer.func_or_class.__mro__[1]):
    async def reconfigure(self, user_config: Any) -> None:
        loading.Engine = BreakableEngine
        await super().reconfigure(user_config)


def build_app(args: dict[str, Any]) -> Any:
    return app_of(MedusaServer, args)


def app_of(server_class: type, args: dict[str, Any]) -> Any:
    """The application of `args`, with one replica, of another class than the service's own."""
    config = server.build_app(args)._bound_deployment
    ours = serve.deployment(serve.ingress()(server_class))
    return ours.options(
        name="MedusaServer",
        user_config=config.user_config,
        ray_actor_options=config.ray_actor_options,
        health_check_period_s=args["health_check_period_s"],
        graceful_shutdown_timeout_s=args["graceful_shutdown_timeout_s"],
        num_replicas=1,
    ).bind(config.init_args[0])
