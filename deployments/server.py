"""The service: one Ray Serve deployment, whose replicas each hold an engine and answer HTTP themselves.

`build_app` is the import path of serve.yaml. Which heads a replica serves is the deployment's `user_config`: a change
of that alone is taken by the replicas that run (`reconfigure`), any other change replaces them one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import logs
from deployments.autoscaling import autoscaling_options, load_of
from deployments.config import HeadsConfig, ServerConfig
from deployments.loading import LoadedService, load_service, settle_process
from deployments.metrics import RayMirror
from deployments.open_streams import EngineUnavailable
from deployments.tracing import exporter_class
from medusa.config import to_dict, validate

# A full replica refuses by itself, at once and in OpenAI's shape. Serve's own limits only bound what is on its way:
# requests beside the replies that an engine holds, and requests waiting in a proxy.
SPARE_ONGOING = 64
PROXY_QUEUE = 1000


@serve.deployment
@serve.ingress()
class MedusaServer:
    """A replica: Ray Serve asks it for its app, its health, its load, and to take other heads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = validate(ServerConfig, config, source="the deployment's config")
        self._service: LoadedService | None = None
        logs.install(requests=self._config.log_requests)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return LateApp(lambda: self._loaded().api)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls it at the start, when it loads everything, and whenever the configuration names other heads.

        At the start heads that cannot be served are an error, and Serve keeps the replicas there were; later the
        replica goes on with the heads it has, and says so.
        """
        if self._service is not None:
            await self._service.heads.take_config(user_config)
            return
        heads = validate(HeadsConfig, user_config, source="user_config")
        # Serve's proxy answers with X-Request-ID itself.
        config = self._config.with_heads(heads)
        self._service = load_service(config, replica=_replica_name(), send_request_id=False)
        self._mirror = RayMirror(self._service.engine.metrics, _ray_gauge)
        self._mirror.start()
        settle_process()

    async def check_health(self) -> None:
        self._loaded().engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return load_of(self._service.engine) if self._service else {}

    def _loaded(self) -> LoadedService:
        if self._service is None:
            raise EngineUnavailable("nothing is loaded: the deployment's user_config names no heads, not even none")
        return self._service

    def __del__(self) -> None:
        if getattr(self, "_service", None) is not None:
            self._mirror.close()
            self._service.close()


class LateApp:
    """An ASGI app that exists before what it passes requests on to."""

    def __init__(self, app: Callable[[], ASGIApp]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app()(scope, receive, send)
            return
        while True:
            event = (await receive())["type"]
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return


def build_app(args: Mapping[str, Any] | ServerConfig) -> serve.Application:
    """The Serve application of a config; raises ConfigError for args that are none."""
    config = args if isinstance(args, ServerConfig) else validate(ServerConfig, args, source="args")
    if config.otlp_traces_endpoint:
        exporter_class()  # where it is missing, here rather than in every replica
    config = _placed(config)
    return MedusaServer.options(**_deployment_options(config)).bind(to_dict(config))


def _placed(config: ServerConfig) -> ServerConfig:
    """With paths that hold in a replica's working directory, and the device named."""
    device = config.device or ("cuda" if ray.is_initialized() and ray.cluster_resources().get("GPU") else "cpu")
    return replace(
        config,
        model=_absolute(config.model),
        heads=_absolute(config.heads) if config.heads else None,
        api_key_file=_absolute(config.api_key_file) if config.api_key_file else None,
        device=device,
    )


def _absolute(path: str) -> str:
    """A folder's full path; anything else (a hub id, a folder of another machine) as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _deployment_options(config: ServerConfig) -> dict[str, Any]:
    capacity = config.max_batch_size + config.max_queued_requests + SPARE_ONGOING
    options: dict[str, Any] = {
        "user_config": to_dict(config.heads_config),
        "max_ongoing_requests": config.max_ongoing_requests or capacity,
        "max_queued_requests": PROXY_QUEUE,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": config.placed_gpus},
        "health_check_period_s": config.health_check_period_s,
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": min(0.5, config.graceful_shutdown_timeout_s),
        "max_constructor_retry_count": 3,
    }
    if config.min_replicas == config.max_replicas:
        return options | {"num_replicas": config.min_replicas}
    return options | {"autoscaling_config": autoscaling_options(config)}


def _replica_name() -> str:
    return serve.get_replica_context().replica_id.unique_id


def _ray_gauge(name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
    from ray.serve.metrics import Gauge

    return Gauge(name, description=description, tag_keys=tag_keys)
