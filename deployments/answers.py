"""OpenAI's answers as types: whole ones, and the chunks of a stream.

Beyond OpenAI's fields: `usage.medusa` tells what speculation gained, and a choice carries its `seed`, which draws the
same reply again. A null that a client expects is set; a field that is not set is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from medusa.engine.sequence import FinishReason


class MedusaUsage(BaseModel):
    """`accepted_tokens` came out of `steps` decode steps (not the prefill's token); their ratio is the mean.

    `accepted_per_depth[d]` counts the steps that kept a guess of head d; it comes with the final usage.
    `heads_version` names the heads that the request was given when it came.
    """

    steps: int
    accepted_tokens: int
    mean_acceptance_length: float
    accepted_per_depth: list[int] | None = None
    heads_version: str | None = None


class ChunkAcceptance(BaseModel):
    """Of a chunk's `tokens`, `accepted` were guesses that a step kept beside its own token."""

    tokens: int
    accepted: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    medusa: MedusaUsage


class ChatLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CalledFunction(BaseModel):
    """In a stream the name comes first and alone, then more and more of the arguments."""

    name: str | None = None
    arguments: str


class ToolCallAnswer(BaseModel):
    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallAnswer] | None = None


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


class Choice(BaseModel):
    index: int
    finish_reason: FinishReason | Literal["tool_calls"] | None
    seed: int | None = None
    medusa: ChunkAcceptance | None = None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    text: str
    logprobs: TextLogprobs | None


class Answer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None
    choices: Sequence[Any]
    usage: Usage | None = None

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class ChatCompletion(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class TextCompletion(Answer):
    """Whole or a chunk: the older API gives both one name."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
