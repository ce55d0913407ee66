"""What is served and how: the fields of serve.yaml's `args`, and of `medusa serve`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deployments.auth import check_hashes, read_hashes
from deployments.sampling_log import SamplingConfig
from deployments.tracing import check_endpoint
from medusa import Typical
from medusa.config import ConfigError, strict
from medusa.quantization import Quantization


def refuse_reference(name: str, value: str | None) -> None:
    """Raises ConfigError for an alias or version of a registry: replicas would each resolve it, at different times."""
    if str(value).startswith("models:/"):
        raise ConfigError(
            f"{name} {value!r} is a registry reference; resolve it to a folder first, "
            "as `medusa serve --model models:/NAME@champion` does"
        )


@strict
@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Which heads: a folder, the version that the registry gave it, and its digest, which a replica verifies."""

    heads: str | None = None
    heads_version: str | None = None
    heads_digest: str | None = None

    def __post_init__(self) -> None:
        refuse_reference("heads", self.heads)


@strict
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What is served and how. Paths must be readable where the replicas run.

    `heads` is a checkpoint folder; a registry reference such as models:/NAME@champion is resolved before, once, so
    that all replicas serve one version: `heads_version` and `heads_digest` say which, and a replica that finds
    another digest refuses to start. The deployment's `user_config` carries these three (`HeadsConfig`); when it
    changes, replicas that run take the new heads.
    """

    model: str
    backbone_digest: str | None = None  # of the weights; a replica that finds another refuses to start
    heads: str | None = None
    heads_version: str | None = None
    heads_digest: str | None = None
    model_name: str | None = None  # in the API; the model's folder name by default
    # the engine
    speculation: Literal["auto", "off"] | int = "auto"
    acceptance: Literal["exact"] | Typical = "exact"
    max_batch_size: int = 16
    max_model_len: int | None = None
    kv_cache_gb: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: Quantization | None = None  # the decoder's weights in one byte each; replies are another model's
    tensor_parallel: int = 1  # processes that share the decoder, each with a GPU of its own on cuda
    device: str | None = None  # None: cuda where this process (or the cluster) has a GPU
    # limits
    max_queued_requests: int = 256  # replies that may wait in a replica; more are answered 429
    max_queued_tokens: int | None = None  # prompt tokens that may wait; None: as many as those replies bring
    max_ongoing_requests: int | None = None  # None: as many as the replica holds
    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 60.0  # for a request's body to arrive
    request_timeout_s: float = 600.0  # from then to the last token
    stall_timeout_s: float = 600.0  # a step that takes longer makes the replica unhealthy
    api_key_file: str | None = None  # hashes of keys, one a line (`medusa serve --new-api-key` draws one)
    api_key_hashes: list[str] = field(default_factory=list)  # the same in the configuration
    tool_notation: Literal["hermes"] | None = None  # how this model writes calls of tools; None: they stay text
    merge_chunks_s: float = 0.02  # under load the chunks of a stream wait so long for more; 0 sends each at once
    sampling: SamplingConfig | None = None  # keeps a share of the prompts, with the users' consent; None keeps nothing
    log_requests: bool = False  # a JSON line for every request, not only for those that fail or are refused
    otlp_traces_endpoint: str | None = None  # the URL that takes traces: a span for each request; None makes none
    # the deployment
    host: str = "127.0.0.1"
    port: int = 8000
    min_replicas: int = 1
    max_replicas: int = 1
    # What autoscaling aims at in a replica (deployments/autoscaling.py); None: not looked at, for the last two.
    target_ongoing_requests: float | None = None  # replies decoded and waiting; None: three quarters of a batch
    target_page_use: float = 0.85  # share of the cache's pages
    target_queued_tokens: int | None = None  # prompt tokens that wait
    target_step_s: float | None = None  # time of a step
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    look_back_s: float = 10.0  # loads are averaged over so long
    num_cpus: float = 1.0
    num_gpus: float | None = None  # None: 1 on cuda, or one for each of tensor_parallel
    health_check_period_s: float = 2.0
    graceful_shutdown_timeout_s: float = 60.0  # a stopped replica may take this long to end what it runs

    def __post_init__(self) -> None:
        refuse_reference("model", self.model)
        refuse_reference("heads", self.heads)
        if self.speculation == 0:
            raise ConfigError(
                f"speculation is 'auto', 'off' or a tree size, got {self.speculation!r} "
                "(YAML 1.1 reads a bare off as false: write it in quotes)"
            )
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ConfigError(
                "max_replicas must be at least 1 and min_replicas 0 to max_replicas, "
                f"got {self.min_replicas} and {self.max_replicas}"
            )
        for name in ("max_batch_size", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queued_requests < 0:
            raise ConfigError(f"max_queued_requests must be 0 or more, got {self.max_queued_requests}")
        for name in ("request_timeout_s", "body_timeout_s", "stall_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        self._check_tensor_parallel()
        check_hashes(self.api_key_hashes, "api_key_hashes")
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)

    def _check_tensor_parallel(self) -> None:
        count = self.tensor_parallel
        if count < 1:
            raise ConfigError(f"tensor_parallel is a number of processes from 1 on, got {count}")
        if count > 1 and self.quantization is not None:
            raise ConfigError(
                f"tensor_parallel={count} and quantization={self.quantization!r} do not go together; give one"
            )
        if count > 1 and self.num_gpus is not None and self.device != "cpu" and self.num_gpus != count:
            raise ConfigError(
                f"tensor_parallel={count} needs num_gpus={count}, one for each process, got {self.num_gpus:g}; leave "
                "num_gpus out"
            )

    @property
    def placed_gpus(self) -> float:
        """What Ray sets aside for a replica."""
        if self.num_gpus is not None:
            return self.num_gpus
        return float(self.tensor_parallel) if (self.device or "").startswith("cuda") else 0.0

    @property
    def served_name(self) -> str:
        return self.model_name or Path(self.model).name

    def engine_arguments(self) -> dict[str, Any]:
        """What `Engine.from_pretrained` takes beside model and heads."""
        return {
            "device": self.device,
            "dtype": getattr(torch, self.dtype) if self.dtype else None,
            "max_batch_size": self.max_batch_size,
            "max_model_len": self.max_model_len,
            "kv_cache_gb": self.kv_cache_gb,
            "speculation": self.speculation,
            "acceptance": self.acceptance,
            "quantization": self.quantization,
            "tensor_parallel": self.tensor_parallel,
        }

    @property
    def heads_config(self) -> HeadsConfig:
        return HeadsConfig(heads=self.heads, heads_version=self.heads_version, heads_digest=self.heads_digest)

    def with_heads(self, heads: HeadsConfig) -> ServerConfig:
        return replace(self, heads=heads.heads, heads_version=heads.heads_version, heads_digest=heads.heads_digest)

    def all_key_hashes(self) -> tuple[str, ...]:
        """Those of the configuration and of the file. Raises ConfigError for a file that cannot be used."""
        from_file = read_hashes(Path(self.api_key_file)) if self.api_key_file else ()
        return (*self.api_key_hashes, *from_file)
