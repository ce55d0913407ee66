"""Tool calls in a reply: the grammar of a call that is asked for, and the calls read from the text as it comes.

A call that must be made (`tool_choice` "required", or a function's name) is written under a grammar. Under "auto" the
model writes what its template taught it; the only notation read here is Hermes' and Qwen's,
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from deployments.chat_protocol import ChatCompletionRequest, NamedTool, Tool
from deployments.structured import json_grammar
from medusa import Grammar

ToolNotation = Literal["hermes"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """Part of call number `index`: its first part has the name, later ones more of the arguments."""

    index: int
    name: str | None
    arguments: str


class Reader(Protocol):
    def push(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        """What the next text gives: content, and calls."""
        ...


class PlainReader:
    """No calls: all text is content."""

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        return text, []


class NamedReader:
    """The whole text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        name, self._name = self._name, None
        return "", [Call(0, name, text)] if text or name else []


class RequiredReader:
    """The whole text is a list of calls; one that was cut short is content."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        self._text += text
        if not is_last:
            return "", []
        try:
            calls = [_call(i, call) for i, call in enumerate(json.loads(self._text))]
        except ValueError:
            return self._text, []
        return "", calls


class HermesReader:
    """Calls between tags; what is no call stays content, tags and all."""

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        self._held += text
        content, calls = "", []
        while (start := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            between, rest = self._held[start + len(OPEN) : end], self._held[end + len(CLOSE) :]
            try:
                calls.append(_call(self._num_calls, json.loads(between)))
                content += self._held[:start].rstrip("\n")
                self._num_calls += 1
            except ValueError:
                content += self._held[: end + len(CLOSE)]
            self._held = rest
        settled = len(self._held) if is_last else self._settled()
        content, self._held = content + self._held[:settled], self._held[settled:]
        if self._num_calls and not content.strip():
            content = ""
        return content, calls

    def _settled(self) -> int:
        """How much of the held text can be no part of a call."""
        start = self._held.find(OPEN)
        if start >= 0:
            return start
        for length in range(min(len(OPEN) - 1, len(self._held)), 0, -1):
            if OPEN.startswith(self._held[-length:]):
                return len(self._held) - length
        return len(self._held)


def reader_for(body: ChatCompletionRequest, notation: ToolNotation | None) -> Reader:
    """A fresh reader for one reply."""
    if isinstance(body.tool_choice, NamedTool):
        return NamedReader(body.tool_choice.function.name)
    if body.tool_choice == "required":
        return RequiredReader()
    if body.shown_tools is not None and notation == "hermes":
        return HermesReader()
    return PlainReader()


def call_grammar(body: ChatCompletionRequest) -> Grammar | None:
    """The grammar of calls that must be made; None where the model is free. Raises ValueError for one too large."""
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedTool):
        return json_grammar(_parameters(next(t for t in tools if t.function.name == body.tool_choice.function.name)))
    if body.tool_choice == "required":
        return json_grammar({"type": "array", "minItems": 1, "items": {"anyOf": _calls(tools)}})
    return None


def _calls(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": _parameters(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _call(index: int, call: Any) -> Call:
    """Raises ValueError for what is no call."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("a call needs a name")
    arguments = call.get("arguments", call.get("parameters", {}))
    return Call(index, call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
