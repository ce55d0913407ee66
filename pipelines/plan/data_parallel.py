"""A training step on N GPUs: one GPU's step, and the part of the communication that it does not hide.

DDP sums the gradients of what learns, bucket by bucket, while the backward goes on; the last bucket is always waited
for. FSDP2 (medusa/training/sharding.py) gathers each decoder layer's weights for every pass over it while the layer
before computes, and scatters its gradients; the root group (embeddings, LM head, heads) is gathered before the step and
scattered after it. In Medusa-1 the frozen backbone is no part of either: only heads travel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.plan.collectives import Network, all_gather, all_reduce
from pipelines.plan.shapes import BF16, HeadsCost, ModelShape, block_parameters
from pipelines.plan.training import FP32, Recipe, flops_per_token

BUCKET = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb


@dataclass(frozen=True)
class StepWork:
    """One GPU's step: its seconds, the share of them in which gradients come, and the bytes of what travels."""

    seconds: float
    backward_share: float
    gradients: float
    root: float
    layers: float
    num_layers: int
    passes: int
    layer_gradients: float = 0.0


@dataclass(frozen=True)
class ScaledStep:
    """`communication` would take so long by itself; `exposed` is what the step is longer for it."""

    seconds: float
    communication: float
    exposed: float

    @property
    def share(self) -> float:
        """Of linear growth."""
        return self.seconds / (self.seconds + self.exposed)


def ddp_step(work: StepWork, gpus: int, network: Network) -> ScaledStep:
    buckets = max(1, math.ceil(work.gradients / BUCKET))
    each = all_reduce(work.gradients / buckets, gpus, network)
    hidden = min((buckets - 1) * each, work.backward_share * work.seconds)
    return ScaledStep(work.seconds, buckets * each, buckets * each - hidden)


def fsdp_step(work: StepWork, gpus: int, network: Network) -> ScaledStep:
    root = all_gather(work.root, gpus, network) + all_gather(work.gradients - work.layer_gradients, gpus, network)
    first = streamed = 0.0
    if work.layers:
        first = all_gather(work.layers / work.num_layers, gpus, network)
        scattered = all_gather(work.layer_gradients / work.num_layers, gpus, network) if work.layer_gradients else 0.0
        streamed = work.num_layers * (work.passes * first + scattered)
    exposed = root + first + max(0.0, streamed - first - work.seconds)
    return ScaledStep(work.seconds, root + streamed, exposed)


def step_work(shape: ModelShape, recipe: Recipe, tokens: int, tokens_per_second: float, reply_share: float) -> StepWork:
    """Of a step of `tokens` a GPU. The heads learn in float32; the layers are bfloat16, float32 where all learn."""
    heads = FP32 * HeadsCost.of(recipe.heads, recipe.kind).parameters
    backward = backward_share(shape, recipe, reply_share)
    if recipe.method == "heads":
        return StepWork(tokens / tokens_per_second, backward, heads, heads, 0.0, shape.num_layers, 0)
    whole = recipe.method == "full"
    width = FP32 if whole else BF16
    adapters = FP32 * (shape.layer_parameters if whole else shape.lora_parameters(recipe.rank))
    vocabulary = shape.parameters - shape.layer_parameters
    return StepWork(
        seconds=tokens / tokens_per_second,
        backward_share=backward,
        gradients=heads + adapters + (FP32 * vocabulary if whole else 0),
        root=heads + width * vocabulary,
        layers=width * shape.layer_parameters + (0 if whole else adapters),
        num_layers=shape.num_layers,
        passes=2 + (recipe.distils and not whole),  # forward and backward; the adapter's base is the teacher
        layer_gradients=adapters,
    )


def backward_share(shape: ModelShape, recipe: Recipe, reply_share: float) -> float:
    """Of a step's arithmetic: two thirds of the heads' blocks, and what the backbone's own backward takes. Gradients of
    vocabulary matrices are taken in the forward (medusa/training/chunked.py) and only handed over in the backward."""
    alone, joint = flops_per_token(shape, recipe, reply_share)
    of_blocks = 4.0 * block_parameters(recipe.heads, recipe.kind)
    if recipe.method == "heads":
        return of_blocks / alone
    backbone = 2.0 * shape.layer_parameters
    again = backbone if recipe.checkpointing else 0.0
    return (of_blocks + backbone * (1.0 if recipe.method == "lora" else 2.0) + again) / joint
