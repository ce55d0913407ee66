"""Prompts of token ids from the texts, messages and ids of a body, each within the vocabulary and the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deployments.async_engine import AsyncEngine
from deployments.chat_protocol import ChatCompletionRequest
from deployments.errors import ApiError
from deployments.fields import shorten
from deployments.protocol import CompletionRequest
from deployments.replies import Echoed
from medusa.tokenizer import ChatTokenizer


class Prompts:
    """Every refusal is a 400 that names the field."""

    def __init__(self, tokenizer: ChatTokenizer, engine: AsyncEngine) -> None:
        self._tokenizer = tokenizer
        self._engine = engine

    def of_chat(self, body: ChatCompletionRequest) -> list[int]:
        return self._encode(self._render(body), "messages", add_special_tokens=body.add_special_tokens is True)

    def of_completion(self, body: CompletionRequest) -> list[list[int]]:
        special = body.add_special_tokens is not False
        return [self._encode(p, "prompt", add_special_tokens=special) for p in body.prompt]

    def echoed(self, body: CompletionRequest, prompts: Sequence[list[int]]) -> list[Echoed] | None:
        """The prompts as they stand before their replies."""
        if not body.echo:
            return None
        texts = [p if isinstance(p, str) else self._tokenizer.decode(p, skip_special_tokens=False) for p in body.prompt]
        return [Echoed(text, ids) for text, ids in zip(texts, prompts, strict=True)]

    def check_ids(self, name: str, token_ids: Sequence[int] | Mapping[int, float]) -> None:
        size = self._engine.vocab_size
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < size]
        if unknown:
            message = f"{name}: token ids {shorten(unknown[:20])} are outside the vocabulary of {size}."
            raise ApiError(400, message, param=name)

    def _render(self, body: ChatCompletionRequest) -> str:
        messages = [message.for_template() for message in body.messages]
        arguments = body.template_arguments()
        plain = self._tokenizer.render_chat(messages, **arguments)
        if body.shown_tools is None:
            return plain
        with_tools = self._tokenizer.render_chat(messages, tools=body.shown_tools, **arguments)
        if with_tools == plain:
            raise ApiError(
                400, "tools: this model's chat template has no place for tools; leave them out.", param="tools"
            )
        return with_tools

    def _encode(self, prompt: str | list[int], param: str, *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            # Unread where it cannot fit: a long text takes seconds to tokenise, and others wait for it.
            most = self._engine.max_model_len - 1
            if not self._tokenizer.can_fit(prompt, most):
                raise self._too_long(f"{len(prompt)} characters, which {most} tokens cannot hold", param)
            prompt = self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            self.check_ids(param, prompt)
        if len(prompt) >= self._engine.max_model_len:
            raise self._too_long(f"{len(prompt)} tokens", param)
        return prompt

    def _too_long(self, length: str, param: str) -> ApiError:
        limit = self._engine.max_model_len
        message = (
            f"The prompt has {length}, but this model's context holds {limit} with the reply; "
            f"send at most {limit - 1} tokens."
        )
        return ApiError(400, message, param=param)
