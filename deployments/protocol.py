"""The bodies of OpenAI's REST API as this service takes and gives them.

Types are strict: `"5"` is no number and `1.0` no integer. A field that would change the meaning of the reply,
and that this service does not have, is refused by name; other unknown fields are ignored and logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from medusa import SamplingParams

logger = logging.getLogger(__name__)

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_TOKENS = 2**31 - 1
DEFAULT_COMPLETION_TOKENS = 16
# The tokenizer's own arguments beside those of a template: a request must not choose code or shapes.
TEMPLATE_RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "return_tensors",
        "padding",
    }
    | {"add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "return_dict"}
    | {"truncation", "max_length", "tokenizer_kwargs", "processor_kwargs"}
)


def explain(details: ErrorDetails) -> tuple[str, str | None]:
    """(message, param) of one validation error of a body: what came, what is allowed, what to do."""
    context = details.get("ctx", {})
    path = [str(part) for part in details["loc"] if part != "body"]
    path += [context["param"]] if "param" in context else []
    param = ".".join(path) or None
    if details["type"] == "json_invalid":
        return (
            f"The body is not valid JSON ({context.get('error', details['msg'])}); send one JSON object.",
            None,
        )
    if details["type"] == "missing":
        if param is None:
            return "The body is empty; send one JSON object.", None
        return f"{param}: required but absent; add it to the body.", param
    if param is None:
        return f"{details['msg']}; send one JSON object with Content-Type: application/json.", None
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "refused":
        return f"{param}: {message}", param
    return f"{param}: {message}, got {_shorten(details['input'])}", param


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refused(message: str, param: str | None = None) -> PydanticCustomError:
    context = {"message": message} | ({"param": param} if param else {})
    return PydanticCustomError("refused", "{message}", context)


def _only(*allowed: Any) -> BeforeValidator:
    """For a field this service does not have: its values that ask for nothing pass, any other is refused."""

    def check(value: Any) -> Any:
        if not any(value == other and type(value) is type(other) for other in allowed):
            choices = " or ".join(map(_shorten, allowed))
            raise _refused(f"{_shorten(value)} is not supported here; leave the field out or send {choices}.")
        return value

    return BeforeValidator(check)


def _optional(parse: Callable[[Any], Any], schema: Any) -> BeforeValidator:
    """`parse` for values that are there; `schema` is what the API's description shows."""
    return BeforeValidator(lambda value: None if value is None else parse(value), json_schema_input_type=schema | None)


def _strings(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"must be a string or a list of up to {MAX_STOPS} strings")
    if len(value) > MAX_STOPS:
        raise _refused(f"at most {MAX_STOPS} stop strings are allowed, got {len(value)}; keep the ones that matter.")
    if not all(value):
        raise ValueError("a stop string must not be empty")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(value: Any) -> Any:
    """One prompt or several, as a list of strings or a list of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if len(value) > MAX_PROMPTS:
        raise _refused(f"at most {MAX_PROMPTS} prompts a request are allowed, got {len(value)}; send several requests.")
    if all(isinstance(item, str) for item in value) or all(_is_ids(item) for item in value):
        return value
    raise ValueError("must hold either strings only, token ids only, or non-empty lists of token ids only")


def _token_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must map token ids to biases, such as {"42": -100}')
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise ValueError('must have token ids as keys, such as {"42": -100}') from None


def _template_kwargs(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must map names of the template to values, such as {"enable_thinking": false}')
    for name, argument in value.items():
        if name in TEMPLATE_RESERVED:
            raise _refused("is set by the service, not by a request; leave it out.", name)
        if not isinstance(argument, str | int | float | bool | None):
            raise _refused(f"must be a single value, got {_shorten(argument)}.", name)
    return value


def _text(value: Any) -> Any:
    """The content of a message: a string, or its text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError('must be a string or a list of parts such as {"type": "text", "text": "..."}')
    return "\n".join(_part_text(index, part) for index, part in enumerate(value))


def _part_text(index: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise _refused(f"{_shorten(kind)} parts are not supported: this model reads text only.", f"{index}.type")
    if not isinstance(part.get("text"), str):
        raise _refused(f"must be a string, got {_shorten(part.get('text'))}.", f"{index}.text")
    return part["text"]


Nothing = Annotated[Any, _only(None)]
NoList = Annotated[Any, _only(None, [])]
Off = Annotated[Any, _only(None, False)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _log_ignored(self) -> Body:
        if self.model_extra:
            names = [name[:64] for name in sorted(self.model_extra)[:20]]
            logger.info("ignored unknown fields of %s: %r", type(self).__name__, names)
        return self


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(Body):
    """What chat and plain completions share; null means the default, as OpenAI's clients send it."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str] | None, _optional(_strings, str | list[str])] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, _optional(_token_keys, dict[str, float])
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
    # What would change the reply and is not here
    bad_words: NoList = None
    structured_outputs: Nothing = None
    guided_json: Nothing = None
    guided_regex: Nothing = None
    guided_choice: Nothing = None
    guided_grammar: Nothing = None
    use_beam_search: Off = None
    truncate_prompt_tokens: Nothing = None
    prompt_logprobs: Nothing = None
    allowed_token_ids: Nothing = None
    logits_processors: NoList = None
    skip_special_tokens: Annotated[Any, _only(None, True)] = None
    return_token_ids: Off = None
    response_format: Annotated[Any, _only(None, {"type": "text"})] = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _refused("only allowed with stream: true; leave it out or stream.", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def token_limit(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        raise NotImplementedError

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
        }
        return SamplingParams(
            max_tokens=self.token_limit() or default_max_tokens,
            top_k=max(self.top_k or 0, 0),  # vLLM's clients write "all tokens" as -1
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.num_logprobs(),
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    echo: Off = None
    suffix: Annotated[Any, _only(None, "")] = None

    @field_validator("best_of")
    @classmethod
    def _same_as_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise _refused(f"{value} differs from n; every reply drawn is returned here, so send n alone.")
        return value

    def num_logprobs(self) -> int | None:
        return self.logprobs


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, Any]])]
    tool_calls: NoList = None
    function_call: Nothing = None
    audio: Nothing = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: they have no developer, whose instructions are the system's."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatCompletionRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: NoList = None
    tool_choice: Annotated[Any, _only(None, "none")] = None
    functions: NoList = None
    function_call: Annotated[Any, _only(None, "none")] = None
    modalities: Annotated[Any, _only(None, ["text"])] = None
    audio: Nothing = None
    web_search_options: Nothing = None
    add_generation_prompt: Annotated[Any, _only(None, True)] = None
    continue_final_message: Off = None
    chat_template: Nothing = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, _optional(_template_kwargs, dict[str, Any])] = None
    documents: NoList = None
    echo: Off = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise _refused("only allowed with logprobs: true; add that or leave it out.", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _refused(
                f"{self.max_tokens} and max_completion_tokens {self.max_completion_tokens} differ; send one.",
                "max_tokens",
            )
        return self

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
