"""The benchmark's client: whole streams in any packets, and an error for everything else."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from benchmarks.sse_client import Connection, Refused

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*events: str) -> bytes:
    parts = [f"data: {event}\n\n".encode() for event in events]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@asynccontextmanager
async def connected(*packets: bytes, close: bool = False):
    """A connection to a server that answers every request with these packets."""

    async def answer(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            for packet in packets:
                writer.write(packet)
                await writer.drain()
                await asyncio.sleep(0.002)
            if close:
                writer.close()
                return

    async def quietly(reader, writer):
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(quietly, "127.0.0.1", 0)
    connection = await Connection.open(*server.sockets[0].getsockname()[:2])
    try:
        yield connection
    finally:
        connection.close()
        server.close()


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_stream_in_packets_of_any_size(size):
    content = HEAD + chunked('{"choices": ["0"]}', '{"usage": {"completion_tokens": 2}}', "[DONE]")
    packets = [content[i : i + size] for i in range(0, len(content), size)]
    async with connected(*packets) as connection:
        for _ in range(2):  # the connection is kept
            reply = await asyncio.wait_for(connection.ask("/v1/completions", {"prompt": "x"}), 10)
            assert reply.last == {"usage": {"completion_tokens": 2}}
            assert 0 < reply.first_s <= reply.total_s


async def test_long_streams_keep_their_end_alone():
    events = ['{"text": "%s"}' % ("x" * 90)] * 500
    async with connected(HEAD + chunked(*events, '{"usage": 1}', "[DONE]")) as connection:
        assert (await connection.ask("/", {})).last == {"usage": 1}
        assert len(connection._body) <= 8192


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + chunked('{"choices": []}', '{"error": {"code": 503}}'),
        HEAD + chunked("[DONE]"),
    ],
)
async def test_what_is_no_whole_stream_is_an_error(answer):
    async with connected(answer) as connection:
        with pytest.raises(RuntimeError, match="did not give a whole stream"):
            await asyncio.wait_for(connection.ask("/v1/completions", {}), 10)


@pytest.mark.parametrize("size", [5, 1000])
async def test_a_refusal_has_its_status_and_leaves_the_connection_in_use(size):
    answer = b'HTTP/1.1 429 Too Many Requests\r\nretry-after: 2\r\nContent-Length: 14\r\n\r\n{"error": 429}'
    async with connected(*(answer[i : i + size] for i in range(0, len(answer), size))) as connection:
        for _ in range(2):
            with pytest.raises(Refused, match='429: {"error": 429}') as refused:
                await asyncio.wait_for(connection.ask("/v1/completions", {}), 10)
            assert refused.value.status == 429 and "retry-after: 2" in refused.value.head


async def test_a_connection_that_is_lost_is_an_error():
    async with connected(HEAD + b'e\r\ndata: {"a": 1}', close=True) as connection:
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(connection.ask("/v1/completions", {}), 10)
