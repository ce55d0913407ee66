"""POST /tokenize and /detokenize, GET /tokenizer_info: what clients need to count and cut prompts as this service does.

The shapes are vLLM's, which lm_eval's remote tokenizer and others read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from deployments.chat_protocol import MAX_TOOLS, Message, Tool
from deployments.fields import Nothing, Off, optional, refused, template_kwargs
from deployments.protocol import Body
from medusa.tokenizer import ChatTokenizer


class TokenizeRequest(Body):
    """Either a text or messages, which the chat template renders."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: Off = None
    chat_template: Nothing = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, optional(template_kwargs, dict[str, Any])] = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refused("send either a prompt or messages, and not both.", "prompt")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**20)


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


def tokenize(tokenizer: ChatTokenizer, body: TokenizeRequest) -> list[int]:
    """Raises ValueError where a template refuses the messages."""
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    assert body.messages is not None
    return tokenizer.encode_chat(
        [message.for_template() for message in body.messages],
        add_special_tokens=body.add_special_tokens is True,
        add_generation_prompt=body.add_generation_prompt is not False,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None,
        **(body.chat_template_kwargs or {}),
    )


def describe(tokenizer: ChatTokenizer, max_model_len: int) -> dict[str, Any]:
    """What GET /tokenizer_info answers: nothing that names files."""
    hf = tokenizer.hf
    special = {name: getattr(hf, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        "tokenizer_class": type(hf).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": max_model_len,
        "chat_template": hf.chat_template,
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
        "digest": tokenizer.digest,
        **special,
    }
