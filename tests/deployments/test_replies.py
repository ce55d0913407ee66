"""The short way to a chunk's JSON gives what the long way gives."""

from __future__ import annotations

import json

import pytest

from deployments.replies import ChatReply, Head, TextReply
from deployments.token_texts import TokenTexts
from deployments.tool_calls import HermesReader, PlainReader
from medusa import Output, TokenLogprob

TEXTS = [" hello", '"quoted" \\ and\nmore', "äöü 🙂", "the text", "\u2028", "</script>", "\x00\x1f"]


@pytest.fixture
def head(tokenizer):
    return Head(reply_id="x-1", created=5, model="tiny", fingerprint="f", texts=TokenTexts(tokenizer.hf))


@pytest.fixture(params=["chat", "text"])
def make(request, head):
    if request.param == "chat":
        return lambda: ChatReply(head, [PlainReader(), PlainReader()])
    return lambda: TextReply(head, None, 2)


def output(text, choice=1, **more):
    return Output("r", choice, [7], text, **more)


@pytest.mark.parametrize("null_usage", [False, True])
def test_both_ways_are_equal(make, null_usage):
    short, long = make(), make()
    for reply in (short, long):
        list(reply.chunks(1, output("first")))
    for text in TEXTS:
        (chunk,) = long.chunks(1, output(text))
        if null_usage:
            chunk.usage = None
        found = short.text_chunk(1, output(text), null_usage=null_usage)
        assert json.loads(found) == json.loads(chunk.to_json())
        assert found == chunk.to_json()
    assert short.text_chunk(1, output(""), null_usage=null_usage) == ""
    assert list(long.chunks(1, output(""))) == []


def test_what_is_more_than_text_goes_the_long_way(make, head):
    reply = make()
    assert reply.text_chunk(1, output("a"), null_usage=False) is None  # its first chunk opens it
    list(reply.chunks(1, output("a")))
    assert reply.text_chunk(1, output("a", logprobs=[TokenLogprob(7, -1.0)]), null_usage=False) is None
    assert reply.text_chunk(1, output("a"), null_usage=False)
    assert reply.text_chunk(0, output("a", choice=0), null_usage=False) is None
    calling = ChatReply(head, [HermesReader()])
    list(calling.chunks(0, output("a", choice=0)))
    assert calling.text_chunk(0, output("a", choice=0), null_usage=False) is None
