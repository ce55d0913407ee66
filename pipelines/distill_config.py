"""What the distil step is told: how the model answers, on what, and which of that decides the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from medusa.config import strict, to_dict
from medusa.quantization import Quantization
from pipelines.answering import ReplyConfig


@strict
@dataclass(frozen=True, kw_only=True)
class DistillConfig(ReplyConfig):
    """How replies are sampled (ReplyConfig), and on what.

    `num_actors` null: one a GPU of the cluster as it is, or one if there is none; 0: in this process, without
    Ray. `tensor_parallel` processes of an actor share a model that one GPU cannot hold. `gpus_per_actor` null: as
    many where there are GPUs. `heads` is a Medusa checkpoint of this backbone, an
    earlier version's perhaps, which makes it faster and changes no token (in float32); in a pipeline "champion"
    is the registry's. `speculation` is then as the engine has it: "auto", "off" or a tree size. The run stops
    when more than `max_failed` of all conversations fail, or when a block has ended its worker `max_attempts`
    times. `quantization` needs `quantized_teacher` beside it: the replies are then those of another model than
    the one that the heads are trained on.
    """

    rows_per_block: int = 64
    heads: str | None = None
    speculation: Literal["auto", "off"] | int = "auto"
    num_actors: int | None = None
    gpus_per_actor: float | None = None
    tensor_parallel: int = 1
    cpus_per_actor: float = 1.0
    max_batch_size: int = 64
    max_model_len: int | None = None
    kv_cache_gb: float | None = None
    max_failed: float = 0.5
    max_attempts: int = 5
    quantization: Quantization | None = None
    quantized_teacher: bool = False

    def __post_init__(self) -> None:
        ReplyConfig.__post_init__(self)
        for name in ("rows_per_block", "max_batch_size", "max_attempts", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.quantization is not None and not self.quantized_teacher:
            raise ValueError(
                f"quantization={self.quantization!r} makes the teacher another model than the one that heads are "
                "trained on; leave it out, or set quantized_teacher=true to have its replies all the same"
            )
        if self.tensor_parallel > 1 and self.quantization is not None:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} and quantization={self.quantization!r} do not go together; "
                "give one of the two"
            )
        if self.tensor_parallel > 1 and self.gpus_per_actor not in (None, 0, self.tensor_parallel):
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} needs as many gpus_per_actor, got {self.gpus_per_actor:g}; "
                "leave gpus_per_actor out"
            )
        if self.num_actors is not None and self.num_actors < 0:
            raise ValueError(
                f"num_actors must be 0 (this process) or more, or null to go by the cluster, got {self.num_actors}"
            )
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed is a fraction from 0 to 1, got {self.max_failed}")

    @property
    def meaning(self) -> dict[str, Any]:
        """What decides the rows and their files; the rest (workers, batch size) may change at a restart."""
        names = {"max_model_len", "rows_per_block", *ReplyConfig.__dataclass_fields__}
        if self.quantization is not None:
            names.add("quantization")
        return {name: value for name, value in to_dict(self).items() if name in names}

    @property
    def blocks_in_flight(self) -> int:
        """Blocks that an actor works on: a full batch beside one that is ending, and one on its way."""
        return 2 + -(-self.max_batch_size // self.rows_per_block)
