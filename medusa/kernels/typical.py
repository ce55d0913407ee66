"""Typical acceptance's verdict on each node, in torch operations that a CUDA graph can capture (no host reads).

Shapes: M flat nodes, V vocabulary, N nodes a tree.
"""

from __future__ import annotations

import torch

from medusa.kernels.cut import Cuts
from medusa.kernels.state import Drafts, RowState, Trees

_WORST = -1e4  # a draft of no probability: still comparable when added up along a path


def judge(
    logits_MV: torch.Tensor,
    drafts: Drafts,
    trees: Trees,
    state: RowState,
    cuts: Cuts,
    *,
    epsilon: float,
    delta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which drafts have a probability above min(epsilon, delta exp(-entropy)) at their parent (paper, section 2.3.1),
    and the log-probability of each node's path: bool and float32 [M], for `walk_typical`. `cuts` are `find_cuts`'."""
    row_M, node_M = drafts.row_M.long(), drafts.node_M.long()
    logprob_MV = distribution(logits_MV, drafts, state, cuts).log_softmax(-1)
    probability_MV = logprob_MV.exp()
    entropy_M = -torch.special.xlogy(probability_MV, probability_MV).sum(-1)
    threshold_M = torch.clamp(delta * torch.exp(-entropy_M), max=epsilon)
    start_M = torch.arange(drafts.num_nodes, device=logits_MV.device) - node_M
    parent_M = start_M + trees.parent_RN[row_M, node_M].clamp(min=0)
    is_root_M = trees.depth_RN[row_M, node_M] == 0
    logprob_M = logprob_MV[parent_M, drafts.tokens_M]
    kept_M = (logprob_M.exp() > threshold_M[parent_M]) | is_root_M
    logprob_M = torch.where(is_root_M, 0.0, logprob_M).nan_to_num(neginf=_WORST)
    return kept_M, _path_sum(logprob_M, start_M, trees.bits_RNW[row_M, node_M])


def distribution(logits_MV: torch.Tensor, drafts: Drafts, state: RowState, cuts: Cuts) -> torch.Tensor:
    """What `sample` draws from, as float32 logits; greedy rows' are their logits."""
    row_M = drafts.row_M.long()
    logits_MV = _without_early_stops(logits_MV.float(), drafts, state)
    temperature_M = state.temperature_R[row_M]
    scaled_MV = logits_MV / torch.where(temperature_M == 0, 1.0, temperature_M.clamp(min=1e-6))[:, None]
    restricted_M = (state.top_p_R < 1) | (state.top_k_R > 0) | (state.min_p_R > 0)
    restricted_M = restricted_M[row_M] & (temperature_M > 0)
    token_V = torch.arange(logits_MV.shape[1], device=logits_MV.device)
    lowest_M1, last_M1 = cuts.value_M[:, None], cuts.token_M[:, None]
    stays_MV = (scaled_MV > lowest_M1) | ((scaled_MV == lowest_M1) & (token_V <= last_M1))
    return scaled_MV.masked_fill(restricted_M[:, None] & ~stays_MV, float("-inf"))


def _without_early_stops(logits_MV: torch.Tensor, drafts: Drafts, state: RowState) -> torch.Tensor:
    row_M = drafts.row_M.long()
    drawn_M = state.num_output_R[row_M] + drafts.position_M - state.length_R[row_M]
    stops_ME = state.stop_ids_RE[row_M]
    masked_ME = (drawn_M < state.min_tokens_R[row_M])[:, None] & (stops_ME >= 0)
    ceiling_ME = torch.where(masked_ME, float("-inf"), float("inf"))
    return logits_MV.scatter_reduce(1, stops_ME.clamp(min=0), ceiling_ME, "amin")


def _path_sum(each_M: torch.Tensor, start_M: torch.Tensor, bits_MW: torch.Tensor) -> torch.Tensor:
    """The sum of `each_M` over every node's ancestors and itself."""
    node_N = torch.arange(bits_MW.shape[1] * 64, device=each_M.device)
    on_path_MN = (bits_MW[:, node_N // 64] >> (node_N % 64)) & 1 != 0
    flat_MN = (start_M[:, None] + node_N).clamp(max=len(each_M) - 1)
    return torch.where(on_path_MN, each_M[flat_MN], 0.0).sum(-1)
