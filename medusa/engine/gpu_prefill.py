"""Prompts on a GPU: chunks of several sequences as flat chains over what is in their pages already.

A pass of usual size is one CUDA graph, so that the host, which also serves streams, is not busy with launches.

After a prompt's last chunk the first token is drawn, the heads guess, and the row's device state is set; from then on
the row takes part in decoding steps. Shapes: B sequences, L of them at their last chunk, M tokens of all chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from medusa.engine.emission import Emission
from medusa.engine.gpu_step import NUM_STOP_IDS, GpuStep, StepBuffers
from medusa.engine.graphs import Graphs
from medusa.engine.host_work import HostWork, changes_logits
from medusa.engine.logprobs import token_logprobs
from medusa.engine.messages import PassShape, StepPass
from medusa.engine.prompt_inputs import NO_GRAPHS, PromptInputs, PromptShape, PromptShapes
from medusa.engine.sequence import Sequence, TokenLogprob
from medusa.engine.staging import staged
from medusa.engine.step import Launched, PrefillChunk, StepTokens

LOGITS_AT_ONCE = 512  # of prompts whose log-probabilities are asked for, to bound their memory


@dataclass(frozen=True)
class Prefilled:
    """A prefill under way: which chunks give a token, the emission of those that ended their prompt, and the
    log-probabilities of prompts where they are asked for."""

    chunks: list[PrefillChunk]
    emission: Launched | None
    prompt_logprobs: list[list[TokenLogprob]]

    def collect(self) -> list[StepTokens]:
        last = iter(self.emission.collect() if self.emission else [])
        steps = [next(last) if chunk.is_last else StepTokens([], []) for chunk in self.chunks]
        return [
            replace(step, prompt_logprobs=logprobs) for step, logprobs in zip(steps, self.prompt_logprobs, strict=True)
        ]


class Prefill:
    """Launches prompt chunks over the pages of `tables_RP`, up to `max_tokens` at once. Processes that share the layers
    launch them without graphs."""

    def __init__(
        self, step: GpuStep, tables_RP: torch.Tensor, host_work: HostWork, graphs: Graphs, max_tokens: int
    ) -> None:
        self._step, self._tables_RP, self._host_work, self._graphs = step, tables_RP, host_work, graphs
        max_chunks = step.state.num_rows - 1
        self._shapes = PromptShapes.upto(max_chunks, max_tokens) if step.team.is_alone else NO_GRAPHS
        self._device = tables_RP.device
        self._nobody = step.state.num_rows - 1
        self._inputs: dict[PromptShape, PromptInputs] = {}
        self._buffers: dict[int, StepBuffers] = {}

    def launch(self, chunks: Items[PrefillChunk], *, guesses: bool) -> Prefilled:
        chunks = list(chunks)
        hidden_Md = self._forward(chunks)
        last, ends, end = [], [], 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            if chunk.is_last:
                last.append(chunk)
                ends.append(end - 1)
        prompt_logprobs = self._prompt_logprobs(chunks, hidden_Md)
        if not last:
            return Prefilled(chunks, None, prompt_logprobs)
        hidden_Ld = hidden_Md.index_select(0, staged(ends, torch.int64, self._device))
        return Prefilled(chunks, self._finish(last, hidden_Ld, guesses), prompt_logprobs)

    def _prompt_logprobs(self, chunks: list[PrefillChunk], hidden_Md: torch.Tensor) -> list[list[TokenLogprob]]:
        """Of the prompt's tokens after each of a chunk's, where they are asked for; waits for the forward then."""
        found: list[list[TokenLogprob]] = []
        start = 0
        for chunk in chunks:
            sequence, params = chunk.sequence, chunk.sequence.params
            following = sequence.prompt_ids[chunk.start + 1 : chunk.end + 1] if sequence.needs_prompt_logprobs else []
            found.append([])
            for first in range(0, len(following), LOGITS_AT_ONCE):
                tokens = following[first : first + LOGITS_AT_ONCE]
                hidden_Dd = hidden_Md[start + first : start + first + len(tokens)]
                logits_DV = hidden_Dd.new_empty(len(tokens), self._step.vocab_size)
                self._step.project(hidden_Dd, logits_DV)
                found[-1] += token_logprobs(logits_DV, tokens, params.prompt_logprobs or 0)
            start += len(chunk.token_ids)
        return found

    def capture(self) -> None:
        """Makes the graphs of all shapes that have one, on passes of nobody."""
        for shape in self._shapes:
            inputs = self._inputs[shape] = PromptInputs.empty(shape, self._nobody, self._device)
            if not self._graphs.has(shape):
                self._graphs.capture(shape, functools.partial(self._pass, inputs))

    def _forward(self, chunks: list[PrefillChunk]) -> torch.Tensor:
        """All chunks' tokens in one pass, padded; writes their keys and values."""
        shape = self._shapes.of([len(chunk.token_ids) for chunk in chunks])
        inputs = self._inputs[shape] if shape.has_graph else PromptInputs.empty(shape, self._nobody, self._device)
        inputs.fill(chunks, self._nobody)
        if shape.has_graph:
            return self._graphs.run(shape, lambda: self._pass(inputs))
        self._step.team.tell(StepPass(PassShape(shape.chunks, shape.tokens, shape.longest, is_chain=True), "eager"))
        return self._pass(inputs)

    def _pass(self, inputs: PromptInputs) -> torch.Tensor:
        length_R = self._step.state.length_R
        visible = inputs.visible(length_R, self._tables_RP)
        length_R.index_copy_(0, visible.rows_B.long(), inputs.length_B)
        return self._step.decode(inputs.drafts(), visible, inputs.shape.longest)

    def _finish(self, chunks: list[PrefillChunk], hidden_Ld: torch.Tensor, guesses: bool) -> Launched:
        """Each prompt's first token, or the one that it is told to go on with; then guesses."""
        buffers = self._buffers_of(chunks)
        self._set_rows(chunks, buffers)
        logits_LV = hidden_Ld.new_empty(len(chunks), self._step.vocab_size)
        self._step.project(hidden_Ld, logits_LV)
        sequences = [chunk.sequence for chunk in chunks]
        wanted = [chunk.gives_token for chunk in chunks]
        changed_LV = self._host_work.change_first(sequences, wanted, logits_LV, buffers.drafts.tokens_M)
        self._step.accept(buffers, changed_LV)
        if guesses and self._step.drafter is not None:
            self._step.remember(hidden_Ld, buffers.rows_B)
        else:
            self._step.state.num_guessed_R.index_fill_(0, buffers.rows_B.long(), 0)  # an assignment waits for the GPU
        emission = Emission.of(buffers.emitted, len(chunks))
        return self._host_work.first_logprobs(sequences, wanted, logits_LV, emission)

    def _buffers_of(self, chunks: list[PrefillChunk]) -> StepBuffers:
        """Trees of one node, at the last token of each prompt; those that are told their token have none."""
        count = len(chunks)
        if count not in self._buffers:
            self._buffers[count] = self._step.new_buffers(count, count)
        buffers = self._buffers[count]
        rows = [chunk.sequence.row for chunk in chunks]
        values = [*rows, *[int(chunk.gives_token) for chunk in chunks]]
        buffers.inputs_2B.copy_(staged(values, torch.int32, self._device).view(2, -1))
        drafts = buffers.drafts
        drafts.tokens_M.copy_(staged([chunk.token_ids[-1] for chunk in chunks], torch.int64, self._device))
        drafts.position_M.copy_(staged([chunk.end - 1 for chunk in chunks], torch.int64, self._device))
        drafts.row_M.copy_(buffers.rows_B)
        drafts.node_M.zero_()
        drafts.valid_M.fill_(1)
        drafts.start_B.copy_(torch.arange(count, device=self._device))
        return buffers

    def _set_rows(self, chunks: list[PrefillChunk], buffers: StepBuffers) -> None:
        """What the device has to know of each sequence from now on. The walk commits the last prompt token, which is
        not counted yet, when it emits the first of the reply."""
        state, rows_L = self._step.state, buffers.rows_B.long()
        sequences = [chunk.sequence for chunk in chunks]
        params = [sequence.params for sequence in sequences]
        stops = [_stop_ids(sequence) for sequence in sequences]
        columns: list[tuple[torch.Tensor, list[int]]] = [
            (state.length_R, [chunk.end - chunk.gives_token for chunk in chunks]),
            (state.root_R, [chunk.token_ids[-1] if chunk.next_token is None else chunk.next_token for chunk in chunks]),
            (state.live_R, [1] * len(chunks)),
            (state.remaining_R, [sequence.max_new_tokens - len(sequence.output_ids) for sequence in sequences]),
            (state.num_output_R, [len(sequence.output_ids) for sequence in sequences]),
            (state.min_tokens_R, [p.min_tokens for p in params]),
            (state.top_k_R, [p.top_k for p in params]),
            (state.seed_R, [sequence.seed for sequence in sequences]),
            (state.choice_R, [sequence.index for sequence in sequences]),
            (state.exact_R, [p.acceptance == "exact" for p in params]),
        ]
        ints = staged([value for _, values in columns for value in values], torch.int64, self._device)
        for (column, _), values_L in zip(columns, ints.view(len(columns), -1), strict=True):
            column[rows_L] = values_L.to(column.dtype)
        floats = [*(p.temperature for p in params), *(p.top_p for p in params), *(p.min_p for p in params)]
        floats_3L = staged(floats, torch.float32, self._device).view(3, -1)
        state.temperature_R[rows_L], state.top_p_R[rows_L], state.min_p_R[rows_L] = floats_3L
        padded = [token for ids in stops for token in [*ids, *[-1] * (NUM_STOP_IDS - len(ids))]]
        state.stop_ids_RE[rows_L] = staged(padded, torch.int64, self._device).view(-1, NUM_STOP_IDS)


def _stop_ids(sequence: Sequence) -> list[int]:
    """Those that the GPU masks and ends at. None where the host changes logits: it masks them all itself, but for the
    end of a grammar that comes before min_tokens, and cuts the reply before anything else is launched."""
    return [] if changes_logits(sequence) else sorted(sequence.stop_ids)[:NUM_STOP_IDS]
