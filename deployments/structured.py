"""Replies of a given form: OpenAI's `response_format` and vLLM's `structured_outputs`, as the engine's grammars."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.fields import refused
from medusa import Grammar

MAX_DEFINITION = 64 * 1024  # characters of a schema or grammar


class Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", serialize_by_alias=True)


class JsonSchema(Form):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Form):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refused("goes with type json_schema, and only with it.", "json_schema")
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        return json_grammar(self.json_schema.schema_ if self.json_schema else {"type": "object"})


class StructuredOutputs(Form):
    """Exactly one of them; `grammar` is in Lark's notation."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    grammar_: str | None = Field(None, alias="grammar", min_length=1)
    json_object: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if sum(value not in (None, False) for value in dict(self).values()) != 1:
            raise refused("needs exactly one of json, regex, choice, grammar and json_object.")
        return self

    def grammar(self) -> Grammar:
        if self.json_ is not None:
            return (
                _bounded(Grammar("json_schema", self.json_))
                if isinstance(self.json_, str)
                else json_grammar(self.json_)
            )
        if self.json_object:
            return json_grammar({"type": "object"})
        if self.grammar_ is not None:
            return _bounded(Grammar("lark", self.grammar_))
        return _bounded(Grammar("regex", self.regex or "|".join(re.escape(text) for text in self.choice or ())))


def json_grammar(schema: dict[str, Any]) -> Grammar:
    """Raises ValueError for a schema over the limit."""
    return _bounded(Grammar("json_schema", json.dumps(schema, ensure_ascii=False)))


def _bounded(grammar: Grammar) -> Grammar:
    if len(grammar.definition) > MAX_DEFINITION:
        raise ValueError(
            f"the {grammar.kind} has {len(grammar.definition)} characters, at most {MAX_DEFINITION} are allowed"
        )
    return grammar
