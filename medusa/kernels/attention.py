"""Attention over pages on a GPU: trees (a tree of one node is plain decoding) and chains (chunks of prompts).

Each sequence's committed tokens are split over programs, with the query heads that share a key-value head packed as
rows of one tile; the last split takes the step's own nodes. The splits are merged by their log-sum-exp, in their order:
few of a small tile by the program that arrives last, those of Hopper's own kernel by its programs together, others in a
second launch. The plain twin is `medusa.kernels.tree_attention`.

Shapes: M flat nodes, H query heads, G key-value heads, D head size, P pages.
"""

from __future__ import annotations

import torch
import triton

from medusa.kernels.attention_kernel import attend_tiles
from medusa.kernels.attention_merge import merge_splits
from medusa.kernels.attention_plan import MAX_ROWS, AttentionPlan, Rotation, Scratch, Visible
from medusa.kernels.launch import options
from medusa.kernels.ring_attention import ring_attention


def registers(plan: AttentionPlan) -> dict[str, int]:
    """The launch option that lets small tiles have more registers than the assembler would give them by itself."""
    return {"maxnreg": 255} if plan.rows < MAX_ROWS else {}


def attend(
    query_MHD: torch.Tensor,
    cache_layer: torch.Tensor,
    visible: Visible,
    plan: AttentionPlan,
    out_MHD: torch.Tensor,
    scratch: Scratch,
    scaling: float,
    *,
    rotation: Rotation | None = None,
    window: int | None = None,
    softcap: float | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of M nodes; `cache_layer` is [2, P, page size, G, D].

    Without `rotation` the nodes' keys and values are written already. With it `query_MHD` is [M, H + 2G, D], queries,
    keys and values as the projections gave them, and the launch itself rotates and writes them. Not for chains, whose
    tiles would each do it for all nodes before.

    Rows of `out_MHD` that belong to no sequence are left with anything.
    """
    num_nodes, size = query_MHD.shape[0], query_MHD.shape[2]
    _, _, page_size, groups, _ = cache_layer.shape
    heads, chain = out_MHD.shape[1], visible.bits_RNW is None
    if (rotation is not None) != (query_MHD.shape[1] > heads) or (rotation and chain):
        raise ValueError(f"rotation goes with trees and [M, H + 2G, D], got {tuple(query_MHD.shape)}")
    if page_size % plan.columns:
        raise ValueError(f"pages of {page_size} tokens do not hold whole tiles of {plan.columns}")
    if plan.ring and rotation is not None and window is None and softcap is None:
        ring_attention(query_MHD, cache_layer, visible, plan, out_MHD, scaling, rotation, pdl=pdl)
        return out_MHD
    group = heads // groups
    tiles = triton.cdiv(plan.max_nodes * group, plan.rows)
    counters = visible.rows_B.shape[0] * tiles * groups
    too_many = plan.merges and counters > len(scratch.arrived)
    if plan.splits > 1 and (plan.splits * num_nodes > len(scratch.part) or too_many):
        raise ValueError(f"{plan} over {num_nodes} nodes needs more scratch than {tuple(scratch.part.shape)}")
    keys, values = cache_layer[0], cache_layer[1]
    num_kept, words = (1, 1) if visible.bits_RNW is None else visible.bits_RNW.shape[1:]
    angles = (None, None, None) if rotation is None else (rotation.position_M, rotation.cos_TD, rotation.sin_TD)
    attend_tiles[(visible.rows_B.shape[0] * tiles, groups, plan.splits)](
        query_MHD, keys, values, visible.rows_B, visible.start_B, visible.count_B, visible.length_R, visible.tables_RP,
        visible.bits_RNW, visible.depth_RN, *angles, out_MHD, scratch.part, scratch.lse, scratch.arrived, scaling,
        softcap or 1.0, window or 0, query_MHD.stride(0), query_MHD.stride(1), out_MHD.stride(0), out_MHD.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2), visible.tables_RP.stride(0),
        0 if rotation is None else rotation.cos_TD.stride(0), num_nodes, plan.splits, tiles, H=heads, GROUP=group,
        D=size, BD=triton.next_power_of_2(size), N=num_kept, W=words, PAGE=page_size, WHOLE=plan.splits == 1,
        MERGED=plan.splits if plan.merges else 0, BM=plan.rows, BN=plan.columns, BT=plan.tree_columns,
        TEAMS=plan.teams, CHAIN=chain, FRESH=rotation is not None, WINDOW=window is not None,
        SOFTCAP=softcap is not None, PRECISION="ieee" if query_MHD.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=plan.warps, num_stages=plan.stages_of(size, keys.element_size()), **registers(plan), **options(pdl),
    )  # fmt: skip
    if plan.splits > 1 and not plan.merges:
        merge_splits(scratch, plan.splits, out_MHD, pdl=pdl)
    return out_MHD
