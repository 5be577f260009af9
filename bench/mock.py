"""`python -m bench.mock`: an upstream that costs next to nothing, and counts what it served.

A raw HTTP/1.1 protocol on uvloop: keep-alive, pipelining, chunked bodies. POST to any path that
ends in /chat/completions answers as the prompt asks (shape.py); GET /mock/stats tells the counts;
GET .../models lists one model. Every frame carries its number and the moment it was written
(CLOCK_MONOTONIC, microseconds): `@17:123456789@`.
"""

import argparse
import asyncio
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import uvloop

from bench.cpu import raise_file_limit
from bench.shape import DEFAULT, Asked, Shape, read_shape, words
from bench.wire import BadAnswer, content_length, dechunk, http_chunk, is_chunked

READY = "mock listens on"
HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 64 * 1024 * 1024
STALL_S_MAX = 120.0
CREATED = 1_700_000_000

_asked = msgspec.json.Decoder(Asked)

PLAIN_HEAD = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Counts(msgspec.Struct):
    """What was asked and served since the start."""

    connections: int = 0
    requests: int = 0
    """Chat completions that were read whole."""
    served: int = 0
    """Of these, answered with 200."""
    ended: int = 0
    """Of these, sent to the end."""
    gone: int = 0
    """Of these, left by the client before the end."""
    errors: int = 0
    cut: int = 0
    stalled: int = 0
    frames: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Answers:
    """What answers are made of, the same for the same seed, and the counts."""

    def __init__(self, seed: int, default: Shape = DEFAULT) -> None:
        self.default = default
        self.counts = Counts()
        self.tokens = [f" {word}".encode() for word in words(seed, 4096).split()]
        self._seed = seed
        self._texts: dict[int, bytes] = {}

    def text(self, size: int) -> bytes:
        if size not in self._texts:
            self._texts[size] = words(self._seed, size).encode()
        return self._texts[size]

    def usage(self, body: bytes, shape: Shape, output_tokens: int) -> bytes:
        """The usage object of an answer; it is counted as billed when it is made."""
        if not shape.usage:
            return b"null"
        input_tokens = len(body) // 4 + 1
        self.counts.input_tokens += input_tokens
        self.counts.output_tokens += output_tokens
        return (
            b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
            b'"prompt_tokens_details":{"cached_tokens":0}}'
        ) % (input_tokens, output_tokens, input_tokens + output_tokens)

    def body(self, asked: Asked, request: bytes, shape: Shape) -> bytes:
        text = self.text(shape.answer_bytes)
        return (
            b'{"id":"chatcmpl-mock%08d","object":"chat.completion","created":%d,"model":%b,'
            b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b"},'
            b'"logprobs":null,"finish_reason":"stop"}],"usage":%b}'
        ) % (
            self.counts.requests,
            CREATED,
            msgspec.json.encode(asked.model),
            text,
            self.usage(request, shape, max(len(text) // 4, 1)),
        )


class Stream:
    """One event stream on its way out."""

    def __init__(self, server: "Mock", asked: Asked, body: bytes, shape: Shape) -> None:
        self.server = server
        self.shape = shape
        self.body = body
        self.sent = 0
        self.ids = (
            b'{"id":"chatcmpl-mock%08d","object":"chat.completion.chunk","created":%d,"model":%b,'
            b'"system_fingerprint":"fp_mock","choices":['
        ) % (server.answers.counts.requests, CREATED, msgspec.json.encode(asked.model))
        self.wants_usage = asked.wants_usage and bool(shape.usage)
        self.last = b',"usage":null}\n\n' if self.wants_usage else b"}\n\n"
        self.due = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = self.server.loop
        self.due = loop.time() + self.shape.first_ms / 1000
        if self.shape.stall_after == 0:
            self._stall()
        elif self.shape.first_ms:
            self.timer = loop.call_at(self.due, self._first)
        else:
            self._first()

    def _first(self) -> None:
        self.server.write(STREAM_HEAD + self._next_frames())

    def _tick(self) -> None:
        self.server.write(self._next_frames())

    def _next_frames(self) -> bytes:
        """The frames that are due now, all in one write, and a timer for the next one."""
        shape = self.shape
        stops = [at for at in (shape.stall_after, shape.cut_after) if at > 0]
        until = min([shape.chunks, *stops])
        if shape.every_ms and self.sent + 1 < until:
            data = http_chunk(self._frame())
            self.due += shape.every_ms / 1000
            self.timer = self.server.loop.call_at(self.due, self._tick)
            return data
        data = b"".join(http_chunk(self._frame()) for _ in range(until - self.sent))
        if until == shape.stall_after:
            self._stall()
        elif shape.cut_after in {until, 0}:
            self.server.answers.counts.cut += 1
            self.server.loop.call_soon(self.server.abort)
        else:
            data += self._end()
            self.server.loop.call_soon(self.server.finished)
        return data

    def _frame(self) -> bytes:
        answers = self.server.answers
        answers.counts.frames += 1
        number, self.sent = self.sent, self.sent + 1
        return (
            b'data: %b{"index":0,"delta":{%b"content":"@%d:%d@%b"},"logprobs":null,'
            b'"finish_reason":null}]%b'
        ) % (
            self.ids,
            b"" if number else b'"role":"assistant",',
            number,
            time.monotonic_ns() // 1000,
            answers.tokens[number % len(answers.tokens)],
            self.last,
        )

    def _end(self) -> bytes:
        stop = b'data: %b{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]%b'
        data = http_chunk(stop % (self.ids, self.last))
        if self.wants_usage:
            usage = self.server.answers.usage(self.body, self.shape, self.sent)
            data += http_chunk(b'data: %b],"usage":%b}\n\n' % (self.ids, usage))
        return data + http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _stall(self) -> None:
        self.server.answers.counts.stalled += 1
        self.timer = self.server.loop.call_later(STALL_S_MAX, self.server.abort)

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class Mock(asyncio.Protocol):
    """One connection. Requests are answered one after the other, in order."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.stream: Stream | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._buffer = b""
        self._parts: list[bytes] = []
        self._missing = 0
        self._waiting: deque[tuple[bytes, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answers.counts.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.answers.counts.gone += 1
        if self.stream is not None:
            self.stream.cancel()
            self.stream = None
            self.answers.counts.gone += 1

    def data_received(self, data: bytes) -> None:
        # A large body comes in many pieces: joining them once keeps this linear.
        if self._missing > len(data):
            self._parts.append(data)
            self._missing -= len(data)
            return
        self._buffer = b"".join((self._buffer, *self._parts, data))
        self._parts, self._missing = [], 0
        while self._buffer and (request := self._take()) is not None:
            self._waiting.append(request)
        self._go_on()

    def _take(self) -> tuple[bytes, bytes] | None:
        """(head, body) of the next request in the buffer; None while it is incomplete."""
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > HEAD_BYTES_MAX:
                self.abort()
            return None
        head = buffer[: end + 2]
        lower = head.lower()
        if b"\r\nexpect: 100-continue" in lower and len(buffer) == end + 4:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if is_chunked(lower):
            return self._take_chunked(head, end + 4)
        length = content_length(lower) or 0
        if length > BODY_BYTES_MAX:
            self.abort()
            return None
        total = end + 4 + length
        if len(buffer) < total:
            self._missing = total - len(buffer)
            return None
        self._buffer = buffer[total:]
        return head, buffer[end + 4 : total]

    def _take_chunked(self, head: bytes, start: int) -> tuple[bytes, bytes] | None:
        try:
            body, end, is_whole = dechunk(self._buffer, start)
        except BadAnswer:
            self.abort()
            return None
        if not is_whole:
            return None
        self._buffer = self._buffer[end:]
        return head, body

    def _go_on(self) -> None:
        while self._waiting and self.stream is None and self.timer is None:
            self._answer(*self._waiting.popleft())

    def _answer(self, head: bytes, body: bytes) -> None:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method == b"POST" and path.endswith(b"/chat/completions"):
            self._chat(body)
        elif path == b"/mock/stats":
            self._send(200, msgspec.json.encode(self.answers.counts))
        elif path.endswith(b"/models"):
            model = {"id": "bench", "object": "model", "created": CREATED, "owned_by": "mock"}
            self._send(200, msgspec.json.encode({"object": "list", "data": [model]}))
        else:
            self._error(404, "there is nothing here")

    def _chat(self, body: bytes) -> None:
        counts = self.answers.counts
        counts.requests += 1
        try:
            asked = _asked.decode(body)
        except msgspec.DecodeError as exc:
            self._error(400, str(exc))
            return
        shape = read_shape(body, self.answers.default)
        if shape.status != 200:
            self._error(shape.status, f"the mock was asked to answer {shape.status}")
            return
        counts.served += 1
        if asked.stream or shape.stall_after >= 0 or shape.cut_after >= 0:
            self.stream = Stream(self, asked, body, shape)
            self.stream.start()
        elif shape.first_ms:
            self.timer = self.loop.call_later(
                shape.first_ms / 1000, self._late_body, asked, body, shape
            )
        else:
            counts.ended += 1
            self._send(200, self.answers.body(asked, body, shape))

    def _late_body(self, asked: Asked, body: bytes, shape: Shape) -> None:
        self.timer = None
        self.answers.counts.ended += 1
        self._send(200, self.answers.body(asked, body, shape))
        self._go_on()

    def _error(self, status: int, message: str) -> None:
        self.answers.counts.errors += 1
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        self._send(status, msgspec.json.encode(error))

    def _send(self, status: int, body: bytes) -> None:
        reason = b"OK" if status == 200 else b"Mock"
        self.write(PLAIN_HEAD % (status, reason, len(body), body))

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def finished(self) -> None:
        if self.stream is not None:
            self.answers.counts.ended += 1
            self.stream = None
            self._go_on()

    def abort(self) -> None:
        if self.stream is not None:
            self.stream.cancel()
            self.stream = None
        if self.transport is not None:
            self.transport.abort()


async def serve(port: int, seed: int, default: Shape, *, is_owned: bool) -> None:
    """Serve on 127.0.0.1 until a signal, or until stdin ends when that is our owner's pipe."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if is_owned:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    answers = Answers(seed, default)
    server = await loop.create_server(lambda: Mock(answers), "127.0.0.1", port, backlog=4096)
    address = server.sockets[0].getsockname()
    sys.stdout.write(f"{READY} http://{address[0]}:{address[1]}\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="farebox bench mock", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--owned", action="store_true", help="stop when stdin ends")
    for name in Shape.__struct_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(DEFAULT, name))
    given = vars(parser.parse_args(arguments))
    port, seed, is_owned = (given.pop(name) for name in ("port", "seed", "owned"))
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(port, seed, Shape(**given), is_owned=is_owned))


if __name__ == "__main__":
    main()
