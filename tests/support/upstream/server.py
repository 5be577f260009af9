"""Routes, connections and counts.

Failure: whatever goes wrong in a mode closes that connection and shows in `errors` of /_stats.
"""

import asyncio
import base64
import json
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from . import answer, broken, modes
from .answer import BadMode, Facts
from .wire import MAX_HEAD_BYTES, BadRequest, Reply, Request, Wire, read_request

API_KEY = "upstream-key"
# Of customers whose keys have a credential of their own.
OWN_KEYS = "own-"
KEPT_REQUESTS = 50
MODE_NAMES = sorted({*modes.PLANS, *broken.BROKEN})


@dataclass(kw_only=True)
class Seen:
    """One request as it came; outcome is open, served, aborted (by the peer) or cut (by us)."""

    number: int
    request: Request
    model: str | None = None
    outcome: str = "open"
    written: list[tuple[float, bytes]] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "method": self.request.method,
            "target": self.request.target,
            "headers": self.request.headers,
            "body": base64.b64encode(self.request.body).decode(),
            "model": self.model,
            "outcome": self.outcome,
            "written": [(at, data.decode("latin-1")) for at, data in self.written or ()],
        }


@dataclass
class Stats:
    requests: int = 0
    served: int = 0
    streams_started: int = 0
    aborted_by_peer: int = 0
    cut_by_us: int = 0
    redirects_followed: int = 0
    unauthorized: int = 0
    connections_opened: int = 0
    models: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


class Server:
    """The provider. `start` listens, `close` ends every connection."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.last: deque[Seen] = deque(maxlen=KEPT_REQUESTS)
        self._keeps_written = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._listener: asyncio.Server | None = None

    async def start(self, port: int) -> int:
        """Listen on loopback; returns the port."""
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: Wire(asyncio.StreamReader(limit=MAX_HEAD_BYTES), self._connection),
            "127.0.0.1",
            port,
            backlog=1024,
        )
        return int(self._listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        wire = writer.transport.get_protocol()
        assert task is not None
        assert isinstance(wire, Wire)
        self._tasks.add(task)
        self.stats.connections_opened += 1
        try:
            while request := await read_request(reader, writer):
                kept: list[tuple[float, bytes]] | None = [] if self._keeps_written else None
                reply = Reply(writer, self._count_stream, kept)
                if request.path.startswith("/_"):
                    await self._control(request, reply)
                elif not await self._watched(request, reply, wire):
                    break
        except BadRequest as exc:
            self.stats.errors.append(f"bad request: {exc}")
        except ConnectionError:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _watched(self, request: Request, reply: Reply, wire: Wire) -> bool:
        """Answer, unless the peer goes first; True when the connection can be used again."""
        seen = Seen(number=self.stats.requests, request=request, written=reply.written)
        self.stats.requests += 1
        self.last.append(seen)
        self._in_flight += 1
        work = asyncio.ensure_future(self._answer(seen, reply))
        gone = asyncio.ensure_future(wire.gone.wait())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
            self._in_flight -= 1
        self._count(seen, reply, results[0])
        return seen.outcome == "served"

    def _count(self, seen: Seen, reply: Reply, result: object) -> None:
        if reply.was_cut:
            seen.outcome = "cut"
            self.stats.cut_by_us += 1
        elif reply.finished:
            seen.outcome = "served"
            self.stats.served += 1
        else:
            seen.outcome = "aborted"
            self.stats.aborted_by_peer += 1
        expected = (asyncio.CancelledError, ConnectionError)
        if isinstance(result, BaseException) and not isinstance(result, expected):
            self.stats.errors.append(repr(result))

    def _count_stream(self) -> None:
        self.stats.streams_started += 1

    async def _answer(self, seen: Seen, reply: Reply) -> None:
        headers = (("x-request-id", f"req-upstream-{seen.number}"), ("openai-processing-ms", "1"))
        request = seen.request
        if request.path == "/v1/redirected":
            self.stats.redirects_followed += 1
        if not _is_known(request.header("authorization")):
            self.stats.unauthorized += 1
            text = "Incorrect API key provided."
            return await _plan(modes.failure(401, text, "invalid_api_key"), reply, headers)
        if request.method == "GET" and request.path.startswith("/v1/models"):
            return await _plan(_models(request.path), reply, headers)
        if request.method != "POST" or request.path != "/v1/chat/completions":
            text = f"Invalid URL ({request.method} {request.path})"
            return await _plan(modes.failure(404, text, "unknown_url"), reply, headers)
        try:
            facts = answer.facts_of(_json_object(request.body))
        except (BadMode, BadBody) as exc:
            return await _plan(modes.failure(400, str(exc), "bad_test_request"), reply, headers)
        seen.model = facts.model
        self.stats.models[facts.model] += 1
        await self._run_mode(facts, reply, headers)

    async def _run_mode(self, facts: Facts, reply: Reply, headers: broken.Fixed) -> None:
        if facts.params.tokens is None and facts.mode in broken.SMALL:
            facts = replace(facts, params=replace(facts.params, tokens=4))
        if facts.params.delay_ms:
            await asyncio.sleep(facts.params.delay_ms / 1000)
        if facts.mode in broken.BROKEN:
            return await broken.BROKEN[facts.mode](facts, reply, headers)
        build = modes.PLANS.get(facts.mode)
        try:
            plan = build(facts) if build else _no_model(facts.model)
        except BadMode as exc:
            plan = modes.failure(400, str(exc), "bad_test_request")
        await broken.deliver(plan, facts, reply, headers)

    async def _control(self, request: Request, reply: Reply) -> None:
        """The tests' own questions; never counted."""
        if request.path in {"/_reset", "/_record"}:
            # _record: until the next reset all requests are kept, and what was written to each.
            self._keeps_written = request.path == "/_record"
            kept = None if self._keeps_written else KEPT_REQUESTS
            self.stats, self.last = Stats(), deque(maxlen=kept)
        body: Any = {}
        if request.path == "/_stats":
            others = len(self._tasks) - 1
            now = {"open_connections": others, "in_flight": self._in_flight}
            body = {**vars(self.stats), **now}
        if request.path == "/_last":
            body = [seen.as_json() for seen in self.last]
        await reply.whole(200, (("content-type", modes.JSON_TYPE),), json.dumps(body).encode())


def _is_known(authorization: str | None) -> bool:
    known = f"Bearer {API_KEY}"
    return authorization == known or (authorization or "").startswith(f"Bearer {OWN_KEYS}")


class BadBody(Exception):
    """The body is no JSON object."""


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except ValueError as exc:
        raise BadBody("We could not parse the JSON body of your request.") from exc
    if not isinstance(parsed, dict):
        raise BadBody("The body must be a JSON object.")
    return parsed


async def _plan(plan: modes.Plan, reply: Reply, headers: broken.Fixed) -> None:
    head = (*headers, ("content-type", plan.content_type), *plan.headers)
    await reply.whole(plan.status, head, plan.body)


def _models(path: str) -> modes.Plan:
    data = [
        {"id": name, "object": "model", "created": 1_750_000_000, "owned_by": "farebox-tests"}
        for name in MODE_NAMES
    ]
    wanted = path.removeprefix("/v1/models").strip("/")
    if not wanted:
        return modes.fixed(200, answer.pretty({"object": "list", "data": data}))
    one = next((item for item in data if item["id"] == wanted), None)
    return modes.fixed(200, answer.pretty(one)) if one else _no_model(wanted)


def _no_model(model: str) -> modes.Plan:
    text = f"The model `{model}` does not exist or you do not have access to it."
    return modes.failure(404, text, "model_not_found")
