"""The bodies of OpenAI's REST API that ask for text: what chat and plain completions share, and plain completions.

Types are strict: `"5"` is no number and `1.0` no integer. A field that would change the meaning of the reply,
and that this service does not have, is refused by name; other unknown fields are ignored and logged.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from deployments.fields import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_TOKENS,
    NoList,
    Nothing,
    Off,
    only,
    optional,
    prompts,
    refused,
    strings,
    token_keys,
)
from deployments.structured import ResponseFormat, StructuredOutputs
from medusa import Grammar, SamplingParams

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _log_ignored(self) -> Body:
        if self.model_extra:
            names = [name[:64] for name in sorted(self.model_extra)[:20]]
            logger.info("ignored unknown fields of %s: %r", type(self).__name__, names)
        return self


class StreamOptions(Body):
    """`include_acceptance` is this service's own: each chunk tells how many tokens each of its steps brought."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_acceptance: bool | None = None


class GenerationRequest(Body):
    """What chat and plain completions share; null means the default, as OpenAI's clients send it."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str] | None, optional(strings, str | list[str])] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, optional(token_keys, dict[str, float])
    ] = None
    user: str | None = None
    # vLLM's additions
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: bool | None = None  # to a plain prompt unless false, to a rendered chat only when true
    # This service's own: exact acceptance from an engine whose rule is another
    acceptance: Literal["exact"] | None = None
    response_format: ResponseFormat | None = None
    # What would change the reply and is not here
    bad_words: NoList = None
    guided_json: Nothing = None
    guided_regex: Nothing = None
    guided_choice: Nothing = None
    guided_grammar: Nothing = None
    use_beam_search: Off = None
    truncate_prompt_tokens: Nothing = None
    prompt_logprobs: Nothing = None
    allowed_token_ids: Nothing = None
    logits_processors: NoList = None
    skip_special_tokens: Annotated[Any, only(None, True)] = None
    return_token_ids: Off = None
    return_tokens_as_token_ids: Off = None
    spaces_between_special_tokens: Annotated[Any, only(None, True)] = None
    prompt_embeds: Nothing = None
    reasoning_effort: Nothing = None
    thinking_token_budget: Annotated[Any, only(None, -1)] = None
    logprob_token_ids: Nothing = None
    repetition_detection: Nothing = None
    watermarking: Off = None
    length_penalty: Annotated[Any, only(None, 1.0, 1)] = None
    guided_whitespace_pattern: Nothing = None
    kv_transfer_params: Nothing = None
    ec_transfer_params: Nothing = None
    vllm_xargs: Nothing = None

    @model_validator(mode="after")
    def _check_form(self) -> GenerationRequest:
        if self.structured_outputs is not None and self.response_format is not None:
            raise refused("says the form again that response_format gives; send one.", "structured_outputs")
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise refused("only allowed with stream: true; leave it out or stream.", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self._stream_option("include_usage")

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self._stream_option("continuous_usage_stats")

    @property
    def include_acceptance(self) -> bool:
        return self._stream_option("include_acceptance")

    def _stream_option(self, name: str) -> bool:
        return self.stream_options is not None and bool(getattr(self.stream_options, name))

    def token_limit(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def num_prompt_logprobs(self) -> int | None:
        return None

    def grammar(self) -> Grammar | None:
        """The form that the reply must have. Raises ValueError for one that is too large."""
        form = self.response_format or self.structured_outputs
        return form.grammar() if form is not None else None

    def sampling_params(self, *, default_max_tokens: int) -> SamplingParams:
        """Raises ValueError where two fields contradict each other (min_tokens above max_tokens)."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "n": self.n,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "priority": self.priority,
            "acceptance": self.acceptance,
        }
        return SamplingParams(
            max_tokens=self.token_limit() or default_max_tokens,
            top_k=max(self.top_k or 0, 0),  # vLLM's clients write "all tokens" as -1
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.num_logprobs(),
            prompt_logprobs=self.num_prompt_logprobs(),
            grammar=self.grammar(),
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    echo: bool | None = None
    suffix: Annotated[Any, only(None, "")] = None

    @field_validator("best_of")
    @classmethod
    def _same_as_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise refused(f"{value} differs from n; every reply drawn is returned here, so send n alone.")
        return value

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None
