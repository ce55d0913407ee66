"""The decoder's layers over any nodes of a GPU step, on this process's share of them and of the pages."""

from __future__ import annotations

import torch

from medusa.engine.decoder import Decoder, FusedDecoder, ModuleDecoder, StepNodes, can_fuse
from medusa.kernels.attention_plan import AttentionPlan, Scratch, Visible
from medusa.kernels.launch import has_warpgroups
from medusa.kernels.ring_attention import has_ring
from medusa.kernels.state import Drafts
from medusa.model import Backbone


class Layers:
    """Plans the attention and runs the decoder. `max_positions` is the longest sequence with a step's tree."""

    def __init__(self, backbone: Backbone, pages: torch.Tensor, max_positions: int) -> None:
        device, heads = pages.device, backbone.num_query_heads
        self._num_kv_heads, self._head_size = pages.shape[-2:]
        self._group = heads // self._num_kv_heads
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        )
        self._warpgroups = has_warpgroups(device)
        scratch = Scratch.of(heads=heads, size=self._head_size, processors=self._processors, device=device)
        self.decoder: Decoder = (
            FusedDecoder(backbone, pages, scratch, max_positions)
            if can_fuse(backbone)
            else ModuleDecoder(backbone, pages, scratch)
        )
        self._ring = isinstance(self.decoder, FusedDecoder) and self.decoder.is_plain and has_ring(pages)

    def __call__(self, drafts: Drafts, visible: Visible, max_nodes: int) -> torch.Tensor:
        """Hidden states [M, d]; keys and values are in the pages then."""
        plan = AttentionPlan.of(
            batch_size=visible.rows_B.shape[0],
            num_nodes=drafts.num_nodes,
            max_nodes=max_nodes,
            chain=visible.bits_RNW is None,
            group=self._group,
            num_kv_heads=self._num_kv_heads,
            head_size=self._head_size,
            processors=self._processors,
            warpgroups=self._warpgroups,
            ring=self._ring,
        )
        return self.decoder(StepNodes(drafts.tokens_M, drafts.position_M, drafts.row_M, drafts.node_M, visible, plan))
