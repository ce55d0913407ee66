"""How single fields of a body are read and refused, and what an error then says.

A field that would change the meaning of the reply, and that this service does not have, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from jinja2.defaults import DEFAULT_NAMESPACE
from pydantic import BeforeValidator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_TOKENS = 2**31 - 1
# What rendering takes beside a template's own names: a request must not choose code or shapes, nor hide what every
# template may call.
TEMPLATE_RESERVED = frozenset(
    {"self", "conversation", "conversations", "messages", "tools", "documents", "chat_template"}
    | {"add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "return_dict"}
    | {"add_special_tokens"}
    | {"tokenize", "return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs", "processor_kwargs"}
    | {"raise_exception", "strftime_now", *DEFAULT_NAMESPACE}
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
    return f"{param}: {message}, got {shorten(details['input'])}", param


def shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refused(message: str, param: str | None = None) -> PydanticCustomError:
    context = {"message": message} | ({"param": param} if param else {})
    return PydanticCustomError("refused", "{message}", context)


def only(*allowed: Any) -> BeforeValidator:
    """For a field this service does not have: its values that ask for nothing pass, any other is refused."""

    def check(value: Any) -> Any:
        if not any(value == other and type(value) is type(other) for other in allowed):
            choices = " or ".join(map(shorten, allowed))
            raise refused(f"{shorten(value)} is not supported here; leave the field out or send {choices}.")
        return value

    return BeforeValidator(check)


def optional(parse: Callable[[Any], Any], schema: Any) -> BeforeValidator:
    """`parse` for values that are there; `schema` is what the API's description shows."""
    return BeforeValidator(lambda value: None if value is None else parse(value), json_schema_input_type=schema | None)


def strings(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"must be a string or a list of up to {MAX_STOPS} strings")
    if len(value) > MAX_STOPS:
        raise refused(f"at most {MAX_STOPS} stop strings are allowed, got {len(value)}; keep the ones that matter.")
    if not all(value):
        raise ValueError("a stop string must not be empty")
    return value


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def prompts(value: Any) -> Any:
    """One prompt or several, as a list of strings or a list of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if len(value) > MAX_PROMPTS:
        raise refused(f"at most {MAX_PROMPTS} prompts a request are allowed, got {len(value)}; send several requests.")
    if all(isinstance(item, str) for item in value) or all(is_ids(item) for item in value):
        return value
    raise ValueError("must hold either strings only, token ids only, or non-empty lists of token ids only")


def token_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must map token ids to biases, such as {"42": -100}')
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise ValueError('must have token ids as keys, such as {"42": -100}') from None


def template_kwargs(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must map names of the template to values, such as {"enable_thinking": false}')
    for name, argument in value.items():
        if name in TEMPLATE_RESERVED:
            raise refused("is set by the service, not by a request; leave it out.", name)
        if not isinstance(argument, str | int | float | bool | None):
            raise refused(f"must be a single value, got {shorten(argument)}.", name)
    return value


def json_object(value: Any) -> Any:
    """The object in a string of JSON; clients send an empty string for a call without arguments."""
    if not isinstance(value, str):
        raise ValueError("must be a JSON object in a string")
    try:
        parsed = from_json(value, allow_inf_nan=False) if value.strip() else {}
    except ValueError as error:
        raise refused(f"must be a JSON object in a string, but is not JSON ({error}), got {shorten(value)}.") from error
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object in a string")
    return parsed


def text(value: Any) -> Any:
    """The content of a message: a string, or its text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError('must be a string or a list of parts such as {"type": "text", "text": "..."}')
    return "\n".join(part_text(index, part) for index, part in enumerate(value))


def part_text(index: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise refused(f"{shorten(kind)} parts are not supported: this model reads text only.", f"{index}.type")
    if not isinstance(part.get("text"), str):
        raise refused(f"must be a string, got {shorten(part.get('text'))}.", f"{index}.text")
    return part["text"]


Nothing = Annotated[Any, only(None)]
NoList = Annotated[Any, only(None, [])]
Off = Annotated[Any, only(None, False)]
