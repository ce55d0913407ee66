"""The body of POST /v1/chat/completions: messages, tools, and what chats have beside plain completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from deployments.fields import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    NoList,
    Nothing,
    Off,
    json_object,
    only,
    optional,
    refused,
    template_kwargs,
    text,
)
from deployments.protocol import Body, GenerationRequest

MAX_TOOLS = 128


class FunctionCall(Body):
    """`arguments` come as the JSON that the model once wrote; templates take the object."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(json_object, json_schema_input_type=str)]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """An assistant's message may have tool calls instead of content; a tool's answers one of them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, optional(text, str | list[dict[str, Any]])] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Nothing = None
    audio: Nothing = None
    refusal: Nothing = None
    # What an assistant thought before its message, by the two names that clients and templates have for it
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise refused(f"only an assistant's message has tool calls, not a {self.role}'s.", "tool_calls")
        if self.content is None and not self.tool_calls:
            raise refused("required but absent; add the message's text.", "content")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: they have no developer, whose instructions are the system's."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content if self.content is not None else "",
        }
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        thoughts = self.reasoning if self.reasoning is not None else self.reasoning_content
        if thoughts is not None:
            message |= {"reasoning": thoughts, "reasoning_content": thoughts}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Annotated[Any, only(None, True)] = None
    functions: NoList = None
    function_call: Annotated[Any, only(None, "none")] = None
    modalities: Annotated[Any, only(None, ["text"])] = None
    audio: Nothing = None
    verbosity: Annotated[Any, only(None, "medium")] = None
    moderation: Nothing = None
    include_reasoning: Annotated[Any, only(None, True)] = None
    return_prompt_text: Off = None
    best_of: Annotated[Any, only(None, 1)] = None
    web_search_options: Nothing = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Nothing = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, optional(template_kwargs, dict[str, Any])] = None
    documents: NoList = None
    echo: Off = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("only allowed with logprobs: true; add that or leave it out.", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refused(
                f"{self.max_tokens} and max_completion_tokens {self.max_completion_tokens} differ; send one.",
                "max_tokens",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise refused("a reply is either begun or continued; send one of the two.", "continue_final_message")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise refused("only allowed with tools; add them or leave it out.", "tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise refused(f"names none of the tools {names}.", "tool_choice.function.name")
        if self.must_call and (self.response_format or self.structured_outputs):
            raise refused("asks for a call where another form is asked for as well; send one.", "tool_choice")
        return self

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """What the template is told of."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def template_arguments(self) -> dict[str, Any]:
        continued = bool(self.continue_final_message)
        begun = self.add_generation_prompt if self.add_generation_prompt is not None else not continued
        arguments: dict[str, Any] = {"add_generation_prompt": begun}
        if continued:
            arguments["continue_final_message"] = True
        return arguments | (self.chat_template_kwargs or {})

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
