"""The runner of a GPU: a decoding step is one CUDA graph, launched before the host has read the step before it.

Graphs are captured when a shape is first needed, one for each (`shapes.py`); those of prompts when the runner is
made. A step of which a request wants what only the host can do (`host_work.py`) is launched in two halves with the host
in between, and the runner then has no lag. Without CUDA the same launches run one by one (in Triton's interpreter),
which is how tests hold this runner against the reference one.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from medusa.checkpoint import Checkpoint
from medusa.decoding import Typical
from medusa.engine.emission import Emission
from medusa.engine.gpu_prefill import Prefill
from medusa.engine.gpu_step import GpuStep
from medusa.engine.graphs import Graphs
from medusa.engine.host_work import HostWork, needs_host
from medusa.engine.kv_cache import KVCache
from medusa.engine.messages import PassShape, StepMove, StepPass
from medusa.engine.sequence import Sequence
from medusa.engine.shapes import Buckets, Shape, StepShapes
from medusa.engine.staging import staged
from medusa.engine.step import Launched, PrefillChunk
from medusa.engine.team import LeadOf
from medusa.engine.tree_rows import TreeRows
from medusa.heads import DraftHeads
from medusa.model import Backbone
from medusa.tree import Path, TokenTree


class GraphRunner:
    """A StepRunner whose plain twin is `medusa.engine.runner.Runner`.

    `growth` is the order in which the policy's trees grow: trees that are a beginning of it need no upload when their
    size changes. `max_prefill_tokens` is the most of one pass, `max_positions` the longest sequence with a step's tree.
    `lead_of` makes this process the first of several that share the layers (`team.py`).
    """

    def __init__(
        self,
        backbone: Backbone,
        checkpoint: Checkpoint | None,
        cache: KVCache,
        *,
        max_batch_size: int,
        max_tree_nodes: int,
        max_prefill_tokens: int,
        max_positions: int,
        guess_width: int,
        acceptance: Typical | None,
        growth: Items[Path] = (),
        lead_of: LeadOf | None = None,
    ) -> None:
        self._shapes = StepShapes(max_batch_size, max_tree_nodes)
        self._step = GpuStep(
            backbone,
            checkpoint,
            cache,
            max_batch_size=max_batch_size,
            tree_nodes=max_tree_nodes,
            max_positions=max_positions,
            guess_width=guess_width,
            acceptance=acceptance,
            lead_of=lead_of,
        )
        self._trees = TreeRows(self._step.trees, growth)
        self._host_work = HostWork(self._trees)
        self._graphs = Graphs(backbone.device, is_alone=self._step.team.is_alone)
        self._prefill = Prefill(self._step, cache.tables, self._host_work, self._graphs, max_prefill_tokens)
        with torch.inference_mode():
            self._prefill.capture()
        self._uploaded: dict[tuple[int, int], list[int]] = {}
        self._with_host = False

    @property
    def lag(self) -> int:
        """1, but 0 while the host has a part in the steps, since it has to know what came before."""
        return 0 if self._with_host else 1

    @property
    def buckets(self) -> Buckets:
        """The budgets of nodes that are worth a graph of their own, over every batch size."""
        return self._shapes.buckets

    @torch.inference_mode()
    def prefill(self, chunks: Items[PrefillChunk], *, num_heads: int) -> Launched:
        """As StepRunner.prefill; if any heads are to guess, all do."""
        self._with_host |= any(chunk.is_last and needs_host(chunk.sequence) for chunk in chunks)
        return self._prefill.launch(chunks, guesses=num_heads > 0)

    @torch.inference_mode()
    def decode(self, sequences: Items[Sequence], trees: Items[TokenTree], *, num_heads: int) -> Launched:
        """As StepRunner.decode; if any heads are to guess, all do."""
        rows = [sequence.row for sequence in sequences]
        counts = self._trees.place(rows, trees)
        shape = self._shapes.of(counts, num_heads > 0)
        self._with_host = any(needs_host(sequence) for sequence in sequences)
        if self._with_host:
            return self._decode_in_halves(shape, sequences, trees, counts)
        self._prepare(shape, "whole")
        self._upload(shape, rows, counts)
        self._step.team.tell(StepPass(_pass_of(shape, moves=shape.moves), "graph"))
        self._graphs.run((shape, "whole"), lambda: self._whole(shape))
        return Emission.of(self._step.buffers(shape).emitted, len(rows))

    @torch.no_grad()
    def take_heads(self, heads: DraftHeads, growth: Items[Path]) -> DraftHeads:
        """As StepRunner.take_heads; the graphs read the weights where they are."""
        assert self._step.drafter is not None
        self._trees.regrow(growth)
        return self._step.drafter.take(heads)

    @torch.inference_mode()
    def rewind(self, sequences: Items[Sequence], length: int) -> None:
        """As StepRunner.rewind."""
        state = self._step.state
        rows = staged([sequence.row for sequence in sequences], torch.int64, state.length_R.device)
        state.length_R[rows] = length
        state.live_R[rows] = 1
        state.remaining_R[rows] = 1 << 30
        state.num_guessed_R[rows] = state.guesses_RKS.shape[1] if self._step.drafter else 0

    def release(self) -> None:
        """Lets go of the graphs; it takes no more steps."""
        self._graphs.clear()

    def _decode_in_halves(
        self, shape: Shape, sequences: Items[Sequence], trees: Items[TokenTree], counts: list[int]
    ) -> Launched:
        self._prepare(shape, "forward")
        self._upload(shape, [sequence.row for sequence in sequences], counts)
        self._step.team.tell(StepPass(_pass_of(shape, moves=False), "graph"))
        hidden_Md = self._graphs.run((shape, "forward"), lambda: self._step.forward(shape))
        buffers, logits_MV = self._step.buffers(shape), self._step.logits(shape)
        starts = [sum(counts[:b]) for b in range(len(counts))]
        changed_MV = self._host_work.change(sequences, trees, starts, logits_MV, buffers.drafts.tokens_M)
        if shape.moves:
            self._step.team.tell(StepMove(shape.batch))
        self._step.decide(shape, hidden_Md, changed_MV)
        emission = Emission.of(buffers.emitted, len(counts))
        return self._host_work.logprobs(sequences, starts, logits_MV, buffers.emitted.path_BD, emission)

    def _whole(self, shape: Shape) -> None:
        hidden_Md = self._step.forward(shape)
        self._step.decide(shape, hidden_Md, self._step.logits(shape))

    def _prepare(self, shape: Shape, part: str) -> None:
        """Captures the graph of a shape that is needed for the first time, on a step of nobody."""
        if not self._graphs.has((shape, part)):
            self._upload(shape, [], [])
            function = self._whole if part == "whole" else self._step.forward
            self._step.team.tell(StepPass(_pass_of(shape, moves=part == "whole" and shape.moves), "capture"))
            self._graphs.capture((shape, part), lambda: function(shape))

    def _upload(self, shape: Shape, rows: list[int], counts: list[int]) -> None:
        """The step's sequences and their node counts; padding counts no nodes of the row that is nobody's."""
        padding = shape.batch - len(rows)
        values = [*rows, *[self._step.state.num_rows - 1] * padding, *counts, *[0] * padding]
        key = (shape.batch, shape.nodes)
        if self._uploaded.get(key) != values:
            self._uploaded[key] = values
            inputs_2B = self._step.buffers(shape).inputs_2B
            inputs_2B.copy_(staged(values, torch.int32, inputs_2B.device).view(2, -1), non_blocking=True)


def _pass_of(shape: Shape, *, moves: bool) -> PassShape:
    """What the other processes know of a step."""
    return PassShape(shape.batch, shape.nodes, shape.max_nodes, moves=moves)
