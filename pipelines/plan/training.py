"""`medusa plan train`: memory, GPUs and hours of one pipeline's distillation and training.

Memory is per GPU and written out item by item. A run that fits one GPU is copied to each of several (DDP); what does
not fit is spread over them, weights and optimiser (FSDP), in the smallest power of two that fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from medusa.config import ConfigError
from medusa.heads import HeadsConfig
from pipelines.plan.figures import Figure, Figures, Method, weakest
from pipelines.plan.shapes import BF16, HeadsCost, HeadsKind, ModelShape, block_parameters
from pipelines.plan.speed import Machine, decode_step, prefill, train_speed

GIB = 2**30
FP32 = 4
MAX_GPUS = 64
WEIGHT_BYTES = {16: 2.0, 8: 1.0, 4: 0.5625}  # 4 bits with a scale of 16 bits for each 32 weights
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}
# Of a chunk's logits in float32, what stands at once (counted by tests/pipelines/plan/test_plan_training.py).
LOGITS_AT_ONCE = {"tokens": 4.25, "soft": 6.25}
TEACHER_AT_ONCE = 2.5  # of the backbone's, until they are cut to the heads' vocabulary
NOT_SPREAD = ("activations of the backbone", "activations of the heads", "logits, one chunk", "runtime")  # by FSDP


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the cost of training. `method` "heads" trains the heads alone; "lora" and "full" the backbone too.

    `loss` is what the heads learn from: "soft" asks the backbone for its distribution. `heads_only_ratio` of
    the steps train the heads alone. `distils` is the KL term against the model as it was.
    """

    heads: HeadsConfig
    kind: HeadsKind = "medusa"
    loss: Literal["tokens", "soft"] = "tokens"
    method: Method = "heads"
    weight_bits: int = 16
    sharding: str = "ddp"
    rank: int = 32
    optimizer: str = "adamw"
    distils: bool = False
    checkpointing: bool = False
    heads_only_ratio: float = 0.0
    epochs: float = 2
    max_length: int = 2048
    micro_batch: int = 1
    chunk_size: int = 1024
    distill_batch: int = 64


@dataclass(frozen=True, kw_only=True)
class Data:
    """Conversations to distil and train on, and their mean lengths in tokens."""

    conversations: int
    prompt_tokens: int
    reply_tokens: int

    @property
    def tokens(self) -> int:
        return self.conversations * (self.prompt_tokens + self.reply_tokens)


@dataclass(frozen=True)
class TrainPlan:
    """`memory` is GiB of one GPU by item, as if all stood on it; `memory_each` with the spread over `num_gpus`.
    `distill_memory` is that of an engine of the distillation, which runs before."""

    gpu: str
    num_gpus: int
    strategy: str
    memory: dict[str, float]
    memory_each: float
    memory_gpu: float
    distill_memory: dict[str, float]
    distill_hours: Figure
    train_hours: Figure
    notes: tuple[str, ...]

    @property
    def hours(self) -> Figure:
        both = weakest(self.distill_hours, self.train_hours)
        return Figure(self.distill_hours.value + self.train_hours.value, both, "distil, then train")


def plan_training(
    model: str,
    shape: ModelShape,
    recipe: Recipe,
    data: Data,
    gpu: str,
    figures: Figures,
    *,
    num_gpus: int | None = None,
    max_hours: float | None = None,
) -> TrainPlan:
    """For so many GPUs; for as few as fit and end within `max_hours`; or for as few as fit. ConfigError when that is
    more than MAX_GPUS."""
    machine = Machine(model, shape, gpu, figures)
    items = memory_items(shape, recipe, figures.assumptions.runtime_gb)
    counts = [num_gpus] if num_gpus else [2**power for power in range(MAX_GPUS.bit_length())]
    reason = ""
    for count in counts:
        plan = _plan(machine, recipe, data, items, count)
        if plan.memory_each > plan.memory_gpu:
            reason = f"{plan.memory_each:.0f} GiB a GPU, where {plan.memory_gpu:.0f} can be planned with"
        elif max_hours is not None and plan.hours.value > max_hours and num_gpus is None:
            reason = f"{plan.hours.value:.1f} hours"
        else:
            return plan
    raise ConfigError(f"{model} on {counts[-1]} x {gpu} would take {reason}; choose other GPUs or a smaller recipe")


def _plan(machine: Machine, recipe: Recipe, data: Data, items: Mapping[str, float], count: int) -> TrainPlan:
    assumed = machine.figures.assumptions
    usable = machine.gpu.memory_gb * 1e9 / GIB * assumed.memory_share
    whole = sum(items.values())
    spread = whole > usable and count > 1
    local = sum(items[name] for name in NOT_SPREAD)
    each = local + (whole - local) / count if spread else whole
    notes = []
    if spread and recipe.sharding != "fsdp":
        notes.append("one GPU does not hold it: set train.sharding=fsdp, which spreads weights and optimiser")
    batch = _distill_batch(machine, recipe, data, usable)
    return TrainPlan(
        gpu=machine.gpu_name,
        num_gpus=count,
        strategy="fsdp" if spread else ("ddp" if count > 1 else "one GPU"),
        memory=dict(items),
        memory_each=each,
        memory_gpu=usable,
        distill_memory=_distill_memory(machine, data, batch),
        distill_hours=_distill_hours(machine, data, batch, count),
        train_hours=_train_hours(machine, recipe, data, count),
        notes=tuple(notes),
    )


def memory_items(shape: ModelShape, recipe: Recipe, runtime_gb: float) -> dict[str, float]:
    """GiB of one GPU: what is frozen in bf16 or quantised, what learns in float32."""
    tokens = recipe.micro_batch * recipe.max_length
    heads = HeadsCost.of(recipe.heads, recipe.kind).parameters
    learning = FP32 + MOMENT_BYTES[recipe.optimizer]  # gradient and moments of a parameter, beside its own weight
    vocabulary = shape.parameters - shape.layer_parameters  # embeddings and LM head are not quantised
    frozen = shape.layer_parameters * WEIGHT_BYTES[recipe.weight_bits] + vocabulary * BF16
    items = {
        "backbone": shape.parameters * FP32 if recipe.method == "full" else frozen,
        "heads": heads * FP32,
        "heads' gradients and optimiser": heads * learning,
    }
    if recipe.method == "lora":
        adapters = shape.lora_parameters(recipe.rank)
        items |= {"adapters": adapters * FP32, "adapters' gradients and optimiser": adapters * learning}
    if recipe.method == "full":
        items["backbone's gradients and optimiser"] = shape.parameters * learning
        if recipe.distils or recipe.heads_only_ratio:
            items["frozen teacher"] = shape.parameters * BF16
    items |= {
        "activations of the backbone": activation_bytes(shape, recipe, tokens),
        "activations of the heads": tokens * shape.hidden_size * FP32 * (2 * recipe.heads.num_heads + 2),
        "logits, one chunk": recipe.chunk_size * FP32 * columns_at_once(shape, recipe),
        "runtime": runtime_gb * 1e9,
    }
    return {name: size / GIB for name, size in items.items()}


def columns_at_once(shape: ModelShape, recipe: Recipe) -> float:
    """Of a row of logits, at the peak of a chunk: a head's, or in joint training the language model's."""
    own = recipe.heads.head_vocab_size
    of_head = LOGITS_AT_ONCE[recipe.loss] * own
    if recipe.loss == "soft":
        of_head = max(of_head, TEACHER_AT_ONCE * shape.vocab_size + 2 * own)
    if recipe.method == "heads":
        return of_head
    return max(of_head, LOGITS_AT_ONCE["soft" if recipe.distils else "tokens"] * shape.vocab_size)


def activation_bytes(shape: ModelShape, recipe: Recipe, tokens: int) -> float:
    """Frozen: what one layer needs at a time. Trained: what its backward reads again, of all layers, or with
    checkpointing each layer's input and one layer."""
    d, kv, wide = shape.hidden_size, shape.num_kv_heads * shape.head_size, shape.intermediate_size
    layer = tokens * BF16 * (6 * d + 2 * kv + 4 * wide)
    if recipe.method == "heads":
        return layer
    if recipe.method == "lora":
        layer += tokens * BF16 * (2 * d + d + d + wide)  # the adapters' inputs behind their dropout
    if recipe.checkpointing:
        return shape.num_layers * tokens * BF16 * d + layer
    return shape.num_layers * layer


def flops_per_token(shape: ModelShape, recipe: Recipe, reply_share: float) -> tuple[float, float]:
    """Of a step that trains heads alone, and of a joint one. Vocabulary matrices run on the reply's tokens only."""
    backbone, heads = 2.0 * shape.layer_parameters, recipe.heads
    blocks = 6.0 * block_parameters(heads, recipe.kind)
    passes = 4.0 if heads.vocabulary == "shared" else 6.0  # a frozen matrix has no gradient of its own
    matrices = passes * heads.num_heads * heads.head_vocab_size * heads.hidden_size * reply_share
    alone = backbone + blocks + matrices + _teacher_flops(shape, recipe, reply_share)
    if recipe.method == "heads":
        return alone, alone
    backward = backbone * (1.0 if recipe.method == "lora" else 2.0)
    joint = alone + backward + (backbone if recipe.checkpointing else 0.0)
    joint += 4.0 * shape.vocabulary_parameters * reply_share  # the LM head's own loss
    if recipe.distils:
        joint += backbone + 2.0 * shape.vocabulary_parameters * reply_share
    return alone, joint


def as_measured(recipe: Recipe) -> Recipe:
    """Training speed was measured with Medusa's heads on tokens."""
    return replace(recipe, kind="medusa", loss="tokens")


def _teacher_flops(shape: ModelShape, recipe: Recipe, reply_share: float) -> float:
    """The backbone's distribution for the heads: once where a chunk holds all rows of a forward, else for each head."""
    if recipe.loss == "tokens":
        return 0.0
    one_chunk = recipe.micro_batch * recipe.max_length * reply_share <= recipe.chunk_size
    return 2.0 * shape.vocabulary_parameters * reply_share * (1 if one_chunk else recipe.heads.num_heads)


def _train_hours(machine: Machine, recipe: Recipe, data: Data, count: int) -> Figure:
    reply_share = data.reply_tokens / (data.prompt_tokens + data.reply_tokens)
    alone, joint = flops_per_token(machine.shape, recipe, reply_share)
    measured = flops_per_token(machine.shape, as_measured(recipe), reply_share)
    tokens = data.tokens * recipe.epochs / count
    first = tokens * (recipe.heads_only_ratio if recipe.method != "heads" else 1.0)
    speeds = [train_speed(machine, "heads", alone, measured[0])] if first else []
    seconds = first / speeds[0].value if first else 0.0
    if recipe.method != "heads":
        speeds.append(train_speed(machine, recipe.method, joint, measured[1]))
        seconds += (tokens - first) / speeds[-1].value
    return Figure(seconds / 3600, weakest(*speeds), "; ".join(speed.how for speed in speeds))


def _distill_batch(machine: Machine, recipe: Recipe, data: Data, usable: float) -> int:
    """As configured, and as the cache has room for."""
    length = data.prompt_tokens + data.reply_tokens
    free = usable * GIB - machine.shape.parameters * BF16 - machine.figures.assumptions.runtime_gb * 1e9
    room = int(free / (length * machine.shape.kv_bytes_per_token))
    if room < 1:
        raise ConfigError(
            f"{machine.model} and one conversation of {length} tokens do not fit one {machine.gpu_name} for "
            "distillation in bf16; choose a larger GPU"
        )
    return min(recipe.distill_batch, room)


def _distill_memory(machine: Machine, data: Data, batch: int) -> dict[str, float]:
    cache = batch * (data.prompt_tokens + data.reply_tokens) * machine.shape.kv_bytes_per_token
    items = {"backbone": machine.shape.parameters * BF16, "KV cache": cache}
    return {name: size / GIB for name, size in items.items()} | {
        "runtime": machine.figures.assumptions.runtime_gb * 1e9 / GIB
    }


def _distill_hours(machine: Machine, data: Data, batch: int, count: int) -> Figure:
    """Plain decoding by an engine a GPU."""
    step = decode_step(machine, batch, 1, data.prompt_tokens + data.reply_tokens // 2, None)
    reading = prefill(machine, data.prompt_tokens)
    seconds = data.conversations * (data.reply_tokens * step.value / batch + reading.value) / count
    return Figure(seconds / 3600, weakest(step, reading), f"batch {batch}, {step.how}")
