"""What bodies are taken, what is refused and under which name, and what the engine is asked for."""

from __future__ import annotations

import inspect
import logging

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from deployments.chat_protocol import ChatCompletionRequest
from deployments.fields import TEMPLATE_RESERVED, explain
from deployments.protocol import CompletionRequest
from medusa import Grammar, SamplingParams
from medusa.tokenizer import ChatTokenizer

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def refusal(model, body):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return explain(caught.value.errors()[0])


def call_with(arguments):
    """A history with a call of these arguments."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}


def chat_params(**fields):
    return ChatCompletionRequest.model_validate(HELLO | fields).sampling_params(default_max_tokens=99)


def text_params(**fields):
    return CompletionRequest.model_validate({"prompt": "x"} | fields).sampling_params(default_max_tokens=16)


def test_defaults_are_openais():
    assert chat_params() == SamplingParams(max_tokens=99)
    assert text_params() == SamplingParams(max_tokens=16)


def test_null_means_the_default():
    fields = ["temperature", "top_p", "n", "stop", "seed", "max_tokens", "logit_bias", "stream", "stream_options"]
    assert chat_params(**dict.fromkeys(fields)) == chat_params()


def test_every_sampling_field_reaches_the_engine():
    params = chat_params(
        max_completion_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=-4,
        n=2,
        stop="end",
        stop_token_ids=[7],
        ignore_eos=False,
        include_stop_str_in_output=True,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"42": -100},
        logprobs=True,
        top_logprobs=4,
        priority=-3,
        acceptance="exact",
        structured_outputs={"choice": ["a.", "b"]},
    )
    assert params == SamplingParams(
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=-4,
        n=2,
        stop=("end",),
        stop_token_ids=(7,),
        ignore_eos=False,
        include_stop_str_in_output=True,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={42: -100.0},
        logprobs=4,
        priority=-3,
        acceptance="exact",
        grammar=Grammar("regex", r"a\.|b"),
    )


def test_logprobs_count_alternatives():
    assert chat_params().logprobs is None
    assert chat_params(logprobs=True).logprobs == 0
    assert chat_params(logprobs=False).logprobs is None
    assert text_params(logprobs=3).logprobs == 3
    assert text_params(logprobs=0).logprobs == 0


def test_echoed_prompts_have_as_many_alternatives_as_replies():
    assert text_params(echo=True, logprobs=3).prompt_logprobs == 3
    assert text_params(echo=True).prompt_logprobs is None
    assert text_params(logprobs=3).prompt_logprobs is None
    assert text_params(ignore_eos=True).ignore_eos


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            Grammar("json_schema", '{"type": "array"}'),
        ),
        ({"structured_outputs": {"json": {"type": "array"}}}, Grammar("json_schema", '{"type": "array"}')),
        ({"structured_outputs": {"json": '{"type": "array"}'}}, Grammar("json_schema", '{"type": "array"}')),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"grammar": "start: x"}}, Grammar("lark", "start: x")),
    ],
)
def test_the_forms_that_a_reply_may_have(fields, grammar):
    assert chat_params(**fields).grammar == grammar


def test_a_huge_schema_is_refused():
    body = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}}
    with pytest.raises(ValueError, match="at most 65536 are allowed"):
        chat_params(**body)


def test_top_k_minus_one_is_all_tokens():
    assert text_params(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [True], {}, 5, None, [["a"]], [[1], []], ["a"] * 1025])
def test_other_forms_of_a_prompt_are_refused(prompt):
    message, param = refusal(CompletionRequest, {"prompt": prompt})
    assert param == "prompt"
    assert "strings" in message or "at most 1024" in message


def test_text_parts_are_joined_and_developers_speak_as_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]}
    request = ChatCompletionRequest.model_validate(body)
    assert [message.for_template() for message in request.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
    ]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_templates_get_the_thoughts_of_earlier_replies_by_both_names(field):
    message = {"role": "assistant", "content": "yes", field: "let me see"}
    request = ChatCompletionRequest.model_validate({"messages": [message, {"role": "user", "content": "why"}]})
    thought, user = [message.for_template() for message in request.messages]
    assert thought["reasoning"] == thought["reasoning_content"] == "let me see"
    assert set(user) == {"role", "content"}


@pytest.mark.parametrize(("arguments", "parsed"), [('{"a": [1, "ä"]}', {"a": [1, "ä"]}), ("{}", {}), ("", {})])
def test_templates_get_the_arguments_of_calls_as_objects(arguments, parsed):
    request = ChatCompletionRequest.model_validate(call_with(arguments))
    (call,) = request.messages[0].for_template()["tool_calls"]
    assert call["function"]["arguments"] == parsed


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0, got -0.1"),
        ({"temperature": "1"}, "temperature", 'valid number, got "1"'),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": True}, "n", "valid integer, got true"),
        ({"n": 1.0}, "n", "valid integer, got 1.0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal to"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 stop strings are allowed, got 5"),
        ({"stop": ""}, "stop", "must not be empty"),
        ({"stop": [1]}, "stop", "a string or a list of up to 4 strings"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream: true"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "5 and max_completion_tokens 6 differ"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid list"),
        ({"messages": [{"role": "nurse", "content": "x"}]}, "messages.0.role", "'assistant' or 'tool', got \"nurse\""),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required but absent"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required but absent"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a string or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "image_url",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages.0.tool_calls.0.function",
            "required but absent",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
                ]
            },
            "messages.0.tool_calls",
            "only an assistant's",
        ),
        (call_with("[1]"), "messages.0.tool_calls.0.function.arguments", "must be a JSON object"),
        (call_with("{"), "messages.0.tool_calls.0.function.arguments", "is not JSON (EOF"),
        (call_with("[" * 100_000), "messages.0.tool_calls.0.function.arguments", "recursion limit"),
        (call_with('{"a": "\\ud800"}'), "messages.0.tool_calls.0.function.arguments", "is not JSON"),
        (call_with({"a": 1}), "messages.0.tool_calls.0.function.arguments", "must be a JSON object in a string"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required but absent"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tool_choice": "auto"}, "tool_choice", "only allowed with tools"),
        ({"tool_choice": "required"}, "tool_choice", "only allowed with tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function.name",
            "none of the tools ['weather']",
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "send one",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with type json_schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "not permitted"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "send one",
        ),
        ({"priority": 2**31}, "priority", "less than"),
        ({"acceptance": "typical"}, "acceptance", "'exact'"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "begun or continued",
        ),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template", "service"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self", "set by the service"),
        ({"chat_template_kwargs": {"namespace": 1}}, "chat_template_kwargs.namespace", "set by the service"),
    ],
)
def test_bad_values_are_named(fields, param, words):
    message, found = refusal(ChatCompletionRequest, HELLO | fields)
    assert found == param
    assert message.startswith(param)
    assert words in message


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"guided_json": {}},
        {"chat_template": "x"},
        {"echo": True},
        {"use_beam_search": True},
        {"truncate_prompt_tokens": 5},
        {"skip_special_tokens": False},
        {"prompt_logprobs": 1},
        {"reasoning_effort": "low"},
        {"thinking_token_budget": 100},
        {"return_tokens_as_token_ids": True},
        {"spaces_between_special_tokens": False},
        {"prompt_embeds": "AAAA"},
        {"logprob_token_ids": [5]},
        {"repetition_detection": {"max_pattern_size": 5}},
        {"watermarking": True},
        {"length_penalty": 0.5},
        {"guided_whitespace_pattern": " "},
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"ec_transfer_params": {}},
        {"vllm_xargs": {"a": 1}},
        {"verbosity": "low"},
        {"moderation": {"model": "omni-moderation-latest"}},
        {"include_reasoning": False},
        {"return_prompt_text": True},
        {"best_of": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_would_change_the_meaning_is_refused_by_name(fields):
    message, param = refusal(ChatCompletionRequest, HELLO | fields)
    assert param == next(iter(fields))
    assert "is not supported here; leave the field out" in message


def test_no_name_that_rendering_takes_itself_is_left_to_requests():
    taken = {
        name
        for call in (ChatTokenizer.encode_chat, PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert taken <= TEMPLATE_RESERVED


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 2},
        {"best_of": 1, "n": 2},
        {"prompt_embeds": "AAAA"},
        {"reasoning_effort": "low"},
        {"return_tokens_as_token_ids": True},
    ],
)
def test_plain_completions_refuse_their_own(fields):
    assert refusal(CompletionRequest, {"prompt": "x"} | fields)[1] == next(iter(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": None},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"echo": False, "skip_special_tokens": True, "use_beam_search": False},
        {"reasoning_effort": None, "thinking_token_budget": -1, "return_tokens_as_token_ids": False},
        {"spaces_between_special_tokens": True, "include_reasoning": True, "best_of": 1},
        {"verbosity": "medium", "length_penalty": 1.0},
    ],
)
def test_forms_that_ask_for_nothing_pass(fields):
    assert chat_params(**fields) == chat_params()


def test_best_of_equal_to_n_passes():
    assert text_params(best_of=1).n == 1
    assert text_params(best_of=3, n=3).n == 3


def test_unknown_fields_are_ignored_with_a_line_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        assert chat_params(store=True, metadata={"a": "b"}) == chat_params()
    assert "['metadata', 'store']" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        chat_params(user="someone", temperature=1.0)
    assert not caplog.text


def test_contradictions_raise_value_errors_that_begin_with_the_field():
    with pytest.raises(ValueError, match="^min_tokens"):
        text_params(min_tokens=17)


def test_long_values_are_shortened_in_messages():
    message, _ = refusal(ChatCompletionRequest, HELLO | {"temperature": "x" * 10_000})
    assert len(message) < 200


def test_values_in_messages_are_shown_as_json():
    message, _ = refusal(ChatCompletionRequest, HELLO | {"temperature": "ä"})
    assert 'got "ä"' in message
