"""The runner that an engine steps with: CUDA graphs of Triton kernels on a GPU, plain torch elsewhere."""

from __future__ import annotations

from medusa.decoding import Typical
from medusa.engine.drafting import Drafting
from medusa.engine.kv_cache import KVCache
from medusa.engine.runner import Runner
from medusa.engine.sharded import followers_of, lead_of
from medusa.engine.step import StepRunner
from medusa.engine.watched import WatchedRunner
from medusa.model import Backbone


def runner_of(backbone: Backbone, cache: KVCache, drafting: Drafting, acceptance: Typical | None) -> StepRunner:
    """For the backbone's device. `acceptance` None is the exact rule."""
    if backbone.device.type == "cuda":
        return graph_runner_of(backbone, cache, drafting, acceptance)
    return Runner(
        backbone,
        drafting.checkpoint,
        cache,
        max_batch_size=drafting.limits.max_batch_size,
        guess_width=drafting.limits.guess_width,
        acceptance=acceptance,
    )


def graph_runner_of(backbone: Backbone, cache: KVCache, drafting: Drafting, acceptance: Typical | None) -> StepRunner:
    """The GPU's, which also leads the other processes of a sharded backbone."""
    from medusa.engine.graph_runner import GraphRunner  # Triton is not installed everywhere

    limits = drafting.limits
    runner = GraphRunner(
        backbone,
        drafting.checkpoint,
        cache,
        max_batch_size=limits.max_batch_size,
        max_tree_nodes=limits.max_nodes,
        max_prefill_tokens=limits.most_prefill_tokens,
        max_positions=limits.max_model_len + limits.max_nodes + limits.num_heads + 1,
        guess_width=limits.guess_width,
        acceptance=acceptance,
        growth=drafting.grown.paths if drafting.grown else (),
        lead_of=lead_of(backbone),
    )
    followers = followers_of(backbone)
    return runner if followers is None else WatchedRunner(runner, followers)
