"""What one decoding step does on a GPU, from draft tokens to the next guesses, without ever asking the host.

    draft -> (Hydra heads ->) decoder -> logits | -> sample -> walk -> compact (-> Medusa heads)
                   `forward`                    |                   `decide`

Everything reads and writes buffers that stay where they are, so that both halves can be held in CUDA graphs, together
or apart: apart where the host changes logits in between.

Shapes: B sequences of a step, M nodes, R batch rows (the last is nobody's), D deepest depth + 1, K heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medusa.checkpoint import Checkpoint
from medusa.decoding import Typical
from medusa.engine.gpu_drafter import make_gpu_drafter
from medusa.engine.kv_cache import KVCache
from medusa.engine.layers import Layers
from medusa.engine.messages import MakeStep, StepSizes
from medusa.engine.shapes import TREE_ROOM, Shape, rounded_up
from medusa.engine.team import Alone, LeadOf, Team, handed_out_inputs, handed_out_moves
from medusa.kernels.attention_plan import Visible
from medusa.kernels.compact import compact
from medusa.kernels.cut import Cuts, find_cuts
from medusa.kernels.draft import draft
from medusa.kernels.launch import supports_pdl
from medusa.kernels.matmul import product, rows_for_product
from medusa.kernels.sample import num_splits, reduce_samples, sample
from medusa.kernels.state import Drafts, Emitted, RowState, Trees
from medusa.kernels.typical import judge
from medusa.kernels.walk import walk, walk_typical
from medusa.model import Backbone

NUM_STOP_IDS = 8  # a reply's stop ids that the GPU knows; the host cuts at any others
SHARED_LOGITS = 256  # steps of up to so many nodes leave their logits in one place; larger ones are rare


@dataclass(frozen=True)
class StepBuffers:
    """What the kernels of a step of one shape hand each other. `inputs_2B` are the batch rows and their node counts."""

    inputs_2B: torch.Tensor
    drafts: Drafts
    cuts: Cuts
    best_MX: torch.Tensor
    sampled_M: torch.Tensor
    emitted: Emitted

    @property
    def rows_B(self) -> torch.Tensor:
        return self.inputs_2B[0]

    @property
    def count_B(self) -> torch.Tensor:
        return self.inputs_2B[1]


class GpuStep:
    """The device state of a batch, and the launches of its steps. `tree_nodes` bounds one tree."""

    def __init__(
        self,
        backbone: Backbone,
        checkpoint: Checkpoint | None,
        cache: KVCache,
        *,
        max_batch_size: int,
        tree_nodes: int,
        max_positions: int,
        guess_width: int,
        acceptance: Typical | None,
        lead_of: LeadOf | None = None,
    ) -> None:
        device = backbone.device
        num_heads = checkpoint.config.num_heads if checkpoint else 1
        room = rounded_up(tree_nodes, TREE_ROOM)
        self.num_depths = num_heads + 1
        self.vocab_size = backbone.vocab_size
        self.state = RowState.empty(max_batch_size + 1, num_heads, guess_width, NUM_STOP_IDS, device)
        self.trees = Trees.roots(max_batch_size + 1, room, num_heads, device)
        self.drafter = (
            make_gpu_drafter(checkpoint.heads, backbone, num_rows=self.state.num_rows, width=guess_width)
            if checkpoint
            else None
        )
        self._backbone, self._cache, self._acceptance = backbone, cache, acceptance
        rows, pages = cache.tables.shape
        sizes = StepSizes(rows=rows, pages=pages, tree_nodes=room, depths=self.num_depths)
        self.team: Team = lead_of(MakeStep(sizes, max_positions)) if lead_of else Alone()
        self._pdl = supports_pdl(device)
        self._layers = Layers(backbone, cache.data, max_positions)
        self._logits_MV = self._new_logits(SHARED_LOGITS)
        self._large_logits: dict[int, torch.Tensor] = {}
        self._buffers: dict[tuple[int, int], StepBuffers] = {}

    def buffers(self, shape: Shape) -> StepBuffers:
        key = (shape.batch, shape.nodes)
        if key not in self._buffers:
            self._buffers[key] = self.new_buffers(*key)
        return self._buffers[key]

    def new_buffers(self, batch: int, nodes: int) -> StepBuffers:
        """Buffers whose inputs are a step of nobody."""
        device = self._backbone.device
        inputs_2B = torch.zeros(2, batch, dtype=torch.int32, device=device)
        inputs_2B[0] = self.state.num_rows - 1
        return StepBuffers(
            inputs_2B=inputs_2B,
            drafts=Drafts.empty(nodes, batch, device),
            cuts=Cuts.empty(nodes, device),
            best_MX=torch.zeros(nodes, num_splits(nodes, self.vocab_size), dtype=torch.int64, device=device),
            sampled_M=torch.zeros(nodes, dtype=torch.int64, device=device),
            emitted=Emitted.empty(batch, self.num_depths, device),
        )

    def logits(self, shape: Shape) -> torch.Tensor:
        """Where `forward` leaves the nodes' logits, [M, V]."""
        if shape.nodes <= SHARED_LOGITS:
            return self._logits_MV[: shape.nodes]
        if shape.nodes not in self._large_logits:
            self._large_logits[shape.nodes] = self._new_logits(shape.nodes)
        return self._large_logits[shape.nodes]

    def _new_logits(self, nodes: int) -> torch.Tensor:
        backbone = self._backbone
        return torch.empty(nodes, backbone.vocab_size, dtype=backbone.dtype, device=backbone.device)

    def forward(self, shape: Shape) -> torch.Tensor:
        """Drafts, decodes, and leaves logits; returns hidden states [M, d] for `decide`."""
        buffers, drafts = self.buffers(shape), self.buffers(shape).drafts
        draft(buffers.rows_B, buffers.count_B, self.trees, self.state, drafts, pdl=False)
        if self.drafter is not None and shape.max_nodes > 1:
            self.drafter.propose(drafts, self.trees, self.state)
        visible = Visible(
            buffers.rows_B, drafts.start_B, buffers.count_B, self.state.length_R, self._cache.tables,
            self.trees.bits_RNW, self.trees.depth_RN,
        )  # fmt: skip
        hidden_Md = self.decode(drafts, visible, shape.max_nodes)
        self.project(hidden_Md, self.logits(shape))
        return hidden_Md

    def decode(self, drafts: Drafts, visible: Visible, max_nodes: int) -> torch.Tensor:
        """The decoder over any nodes: a step's, or a prompt's chunks (`visible` then has no trees)."""
        self.team.hand_out(handed_out_inputs(drafts, visible))
        return self._layers(drafts, visible, max_nodes)

    def project(self, hidden_Md: torch.Tensor, logits_MV: torch.Tensor) -> None:
        """The LM head, with the model's scale and soft-cap."""
        head = self._backbone.model.get_output_embeddings()
        product(hidden_Md, head.weight, logits_MV, head.bias, pdl=self._pdl)
        capped = self._backbone.cap(logits_MV)
        if capped is not logits_MV:
            logits_MV.copy_(capped)

    def decide(self, shape: Shape, hidden_Md: torch.Tensor, logits_MV: torch.Tensor) -> None:
        """Samples at every node, accepts, moves the accepted keys and values together, and guesses anew."""
        buffers = self.buffers(shape)
        drafter = self.drafter if shape.guesses else None
        self.accept(buffers, logits_MV, num_guessed=self.num_depths - 1 if drafter else 0)
        if shape.moves:
            self._move(buffers)
        if drafter is not None:
            last_B = buffers.emitted.last_B
            last_hidden_Bd = rows_for_product(len(last_B), hidden_Md.shape[1], like=hidden_Md)
            torch.index_select(hidden_Md, 0, last_B, out=last_hidden_Bd)
            drafter.remember(last_hidden_Bd, buffers.rows_B, self.state)

    def _move(self, buffers: StepBuffers) -> None:
        rows_B, emitted, length_R, tables_RP = buffers.rows_B, buffers.emitted, self.state.length_R, self._cache.tables
        self.team.hand_out(handed_out_moves(rows_B, length_R, tables_RP, emitted))
        compact(self._cache.data, tables_RP, rows_B, emitted, length_R, pdl=self._pdl and self.team.is_alone)

    def accept(self, buffers: StepBuffers, logits_MV: torch.Tensor, *, num_guessed: int = 0) -> None:
        """Sample, then match; or the typical rule. So many heads guess after what live rows accept."""
        drafts, cuts = buffers.drafts, buffers.cuts
        find_cuts(logits_MV, drafts, self.state, cuts, pdl=self._pdl)
        rule = self._acceptance
        if rule is None:
            sample(logits_MV, drafts, self.state, cuts, buffers.best_MX, pdl=self._pdl)
            walk(
                buffers.rows_B, buffers.count_B, drafts, buffers.best_MX, self.trees, self.state, buffers.emitted,
                num_guessed=num_guessed, pdl=self._pdl,
            )  # fmt: skip
            return
        sample(logits_MV, drafts, self.state, cuts, buffers.best_MX, greedy=rule.root == "greedy", pdl=self._pdl)
        reduce_samples(buffers.best_MX, buffers.sampled_M, pdl=self._pdl)
        kept_M, score_M = judge(logits_MV, drafts, self.trees, self.state, cuts, epsilon=rule.epsilon, delta=rule.delta)
        walk_typical(
            buffers.rows_B, buffers.count_B, drafts, buffers.sampled_M, kept_M, score_M, self.trees, self.state,
            buffers.emitted, num_guessed=num_guessed, pdl=False,
        )  # fmt: skip

    def remember(self, last_hidden_Bd: torch.Tensor, rows_B: torch.Tensor) -> None:
        """All heads guess after prompts, now or when the next step's trees are known."""
        assert self.drafter is not None
        self.drafter.remember(last_hidden_Bd, rows_B, self.state)
        self.state.num_guessed_R.index_fill_(0, rows_B.long(), self.state.guesses_RKS.shape[1])
