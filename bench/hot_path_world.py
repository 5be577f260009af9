"""One worker's objects without any I/O, and one request to drive through them."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.shape import Shape, chat_body, words
from billing.prices import PriceBook, PriceVersion
from billing.receipts import Outcome, encode_receipt
from billing.till_link import Script
from billing.till_wire import Packed
from config.ids import new_id
from config.load import load
from config.secret import Secret
from config.settings import Log
from gateway.log import set_up_logging
from gateway.metrics import Metrics
from gateway.protocols import chat
from gateway.protocols.chat_answer import read_answer, usage_for_client, with_usage
from gateway.rates import config_rates
from gateway.relay.admit import admit, prepare
from gateway.relay.authenticate import _Entry
from gateway.relay.call import Arrival, Call, Caller
from gateway.relay.meter import BodyMeter, StreamMeter
from gateway.relay.record import record
from gateway.relay.settle import bill_reported, end_call
from gateway.services import Services
from keys.api_key import digest, generate
from keys.principal import Principal

MODEL = "bench"
PEPPER = "p" * 48
BUFFER_BYTES = 256 * 1024
USAGE = b'{"prompt_tokens":256,"completion_tokens":150,"total_tokens":406}'


class AnsweredLink:
    """In place of the till's connection: packs what would be sent, and has the answer."""

    call_timeout_s = 1.0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def send(self, script: Script, packed: Packed, *, tells: bool = False) -> asyncio.Future[Any]:
        self.sent = b"*%d\r\n%b%b" % (packed.count + 2, script.by_sha, packed.words)
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_result([b"admitted", 0, 0])
        return future

    def flush(self) -> None:
        pass


class World:
    """What the stages work on. `forget` drops what they piled up."""

    def __init__(self, services: Services, key: bytes, caller: Caller) -> None:
        self.services = services
        self.caller = caller
        self.headers = {
            b"authorization": b"Bearer " + key,
            b"content-type": b"application/json",
        }
        self.plain = chat_body(MODEL, 1024, Shape(), stream=False, seed=1)
        self.long = chat_body(MODEL, 32 * 1024, Shape(), stream=False, seed=1)
        self.facts = chat.read_facts(self.plain)
        streamed = chat_body(MODEL, 1024, Shape(), stream=True, seed=1)
        # A client that did not ask for usage: the one case in which a body is written anew.
        self.stream_facts = chat.read_facts(
            streamed.replace(b'"stream_options":{"include_usage":true},', b"")
        )
        self.answer = (
            b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"bench",'
            b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b"},'
            b'"finish_reason":"stop"}],"usage":%b}'
        ) % (words(1, 600).encode(), USAGE)
        envelope = read_answer(self.answer)
        assert envelope is not None
        self.envelope = envelope
        frame = (
            b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,'
            b'"model":"bench","system_fingerprint":"fp_mock","choices":'
        )
        self.chunk = frame + (
            b'[{"index":0,"delta":{"content":" word"},"logprobs":null,'
            b'"finish_reason":null}],"usage":null}\n\n'
        )
        self.last = frame + b'[],"usage":%b}\n\ndata: [DONE]\n\n' % USAGE
        self.meter = StreamMeter(buffer_bytes_max=BUFFER_BYTES)
        self.call = self._call()
        self.seen = self._seen()
        found = bill_reported(self.call, self.seen, None)
        assert found is not None
        self.found = found
        self.receipt = end_call(services, self._open(), Outcome.COMPLETE, found, self.seen).receipt

    def _call(self) -> Call:
        call = self.prepare()
        call.first_byte_at = time.time()
        return call

    def _open(self) -> Call:
        self.call.is_open = True
        return self.call

    def _seen(self) -> Any:
        return BodyMeter(self.answer).seen

    def authenticate(self) -> Coroutine[Any, Any, Caller]:
        return self.services.authenticator.authenticate(self.headers)

    def read_facts(self) -> object:
        return chat.read_facts(self.plain)

    def read_facts_long(self) -> object:
        return chat.read_facts(self.long)

    def prepare(self) -> Call:
        return prepare(self.services, Arrival.now(), self.caller, self.facts)

    async def admit(self) -> None:
        await admit(self.services, self.call)
        self.call.is_open = False

    def upstream_body(self) -> bytes:
        return chat.upstream_body(self.stream_facts, MODEL)

    def meter_body(self) -> None:
        BodyMeter(self.answer)

    def meter_chunk(self) -> object:
        return self.meter.feed(self.chunk)

    def meter_end(self) -> object:
        return StreamMeter(buffer_bytes_max=BUFFER_BYTES).feed(self.last)

    def bill(self) -> object:
        return bill_reported(self.call, self.seen, None)

    def encode_receipt(self) -> bytes:
        return encode_receipt(self.call.open_receipt(Outcome.COMPLETE))

    def settle(self) -> None:
        end_call(self.services, self._open(), Outcome.COMPLETE, self.found, self.seen)

    def patch_usage(self) -> bytes:
        new = usage_for_client(self.envelope.usage, 123_456, "rcpt_01jd0000000000000000000000")
        return with_usage(self.answer, self.envelope, new)

    def record(self) -> None:
        record(self.services, self.call, self.receipt)

    def forget(self) -> None:
        self.services.settler._queue.clear()
        self.meter = StreamMeter(buffer_bytes_max=BUFFER_BYTES)


@asynccontextmanager
async def open_world(folder: Path) -> AsyncIterator[World]:
    """Services that are connected to nothing, with one key that is known."""
    settings = load(
        None,
        {},
        {
            "keys.pepper": Secret(PEPPER),
            "keys.mode": "test",
            "keys.cache_ttl_ms": 86_400_000,
            "log.path": str(folder / "gateway.log"),
            "till.url": Secret("redis://127.0.0.1:1/0"),
            "providers": {"mock": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"}},
            "models": {MODEL: {"routes": [{"provider": "mock"}], "price": PRICE}},
        },
    ).settings
    set_up_logging(Log(path=settings.log.path))
    services = Services(settings, None, None, Metrics())  # type: ignore[arg-type]
    services.prices = PriceBook(
        PriceVersion(
            price_version=1,
            model=model,
            source="config",
            effective_from=datetime(2020, 1, 1, tzinfo=UTC),
            rates=rates,
        )
        for model, rates in config_rates(settings).items()
    )
    services.till.link = AnsweredLink()  # type: ignore[assignment]
    services.till.epoch.number = 1
    key = generate("test").secret.encode()
    try:
        yield World(services, key, _known(services, key))
    finally:
        services.settler._queue.clear()
        await services.client.close()


PRICE = {"input_usd_per_mtok": "0.15", "output_usd_per_mtok": "0.60"}


def _known(services: Services, key: bytes) -> Caller:
    """Put the key into the authenticator's cache, as a look into the book would."""
    sealed = digest(key, PEPPER.encode())
    principal = Principal(
        account_id=new_id(),
        virtual_key_id=new_id(),
        app_key_id=new_id(),
        digest=sealed,
        expires_at=None,
        account_active=True,
    )
    caller = services.authenticator._caller(principal)
    services.authenticator._entries[sealed] = _Entry(caller, time.monotonic())
    return caller
