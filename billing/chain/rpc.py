"""One node of the chain, asked by JSON-RPC over HTTP. The door to httpx.

What a node says is a stranger's: its size, its time and its shape are bounded, redirects are not
followed, and its words are never logged. Its URL is a secret; logs name nodes by their place in the
settings, from 1. Failure: NodeUnavailable, or BadAnswer when the answer cannot be read.
"""

import asyncio
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from billing.chain import wire
from billing.chain.breaker import Breaker, Bucket
from billing.chain.errors import BadAnswer, ChainError, NodeRefused, NodeUnavailable
from billing.chain.verify import TRANSFER_TOPIC, ChainRules
from billing.chain.wire import Block, FoundLog, Heads, Receipt
from config.clock import seconds
from config.secret import Secret
from config.settings import Chain

T = TypeVar("T")
log = logging.getLogger("billing.chain")

CONNECTIONS_MAX = 8
TOO_MANY_REQUESTS = 429
# Codes of JSON-RPC that say the same: https://eips.ethereum.org/EIPS/eip-1474
LIMIT_CODES = (-32005, 429)
DECIMALS_CALL = "0x313ce567"
BALANCE_CALL = "0x70a08231"


class _Error(msgspec.Struct):
    code: int


class _Answer(msgspec.Struct):
    id: int | None = None
    result: msgspec.Raw = msgspec.Raw()
    error: _Error | None = None


class Node:
    """A node; counts and tls are shared by all of them."""

    def __init__(
        self, name: str, url: Secret, chain: Chain, counts: Counter[str], tls: ssl.SSLContext
    ) -> None:
        self.name = name
        self._url = url
        self._timeout_ms = int(chain.timeout_s * 1000)
        self._bytes_max = chain.answer_bytes_max
        self._counts = counts
        self._bucket = Bucket(chain.requests_per_second, chain.requests_burst, _now_ms())
        self._breaker = Breaker(chain.failures_max, int(chain.rest_s * 1000))
        self._last_id = 0
        self._client = _client(tls)

    async def close(self) -> None:
        await self._client.aclose()

    async def chain_id(self) -> int:
        return await self._ask("eth_chainId", (), wire.read_number)

    async def has_code(self, address: str) -> bool:
        return await self._ask("eth_getCode", (address, "latest"), wire.read_has_code)

    async def decimals(self, token: str) -> int:
        call = {"to": token, "data": DECIMALS_CALL}
        return await self._ask("eth_call", (call, "latest"), wire.read_word)

    async def balance_units(self, token: str, owner: str, block_number: int) -> int:
        """What the owner had after this block."""
        call = {"to": token, "data": BALANCE_CALL + _padded(owner)}
        return await self._ask("eth_call", (call, hex(block_number)), wire.read_word)

    async def find_receipt(self, tx_hash: str) -> Receipt | None:
        read = wire.receipt_reader(tx_hash)
        return await self._ask("eth_getTransactionReceipt", (tx_hash,), read)

    async def find_block(self, number: int) -> Block | None:
        found = await self._block(hex(number))
        if found is not None and found.number != number:
            raise self._bad(BadAnswer("another block"), "eth_getBlockByNumber")
        return found

    async def heads(self, *, by_tags: bool) -> Heads:
        """Raises NodeUnavailable when the node does not know its newest block."""
        # The newest last: asked for at once, safe may come out later than latest.
        finalized = await self._head("finalized") if by_tags else None
        safe = await self._head("safe") if by_tags else None
        latest = await self._head("latest")
        if latest is None:
            raise NodeUnavailable(self.name, "no_head")
        return Heads(latest=latest, safe=safe, finalized=finalized)

    async def find_logs(self, rules: ChainRules, first: int, last: int) -> tuple[FoundLog, ...]:
        """Transfers to the treasury in these blocks, both included, in order."""
        topics = (TRANSFER_TOPIC, None, "0x" + _padded(rules.treasury))
        asked = {
            "address": rules.token,
            "topics": topics,
            "fromBlock": hex(first),
            "toBlock": hex(last),
        }
        read = wire.logs_reader(rules.token, topics, first, last)
        return await self._ask("eth_getLogs", (asked,), read)

    async def _head(self, tag: str) -> int | None:
        try:
            found = await self._block(tag)
        except NodeRefused:
            return None  # a chain without this tag
        return found.number if found is not None else None

    async def _block(self, which: str) -> Block | None:
        return await self._ask("eth_getBlockByNumber", (which, False), wire.read_block)

    async def _ask(self, method: str, params: Sequence[Any], read: Callable[[bytes], T]) -> T:
        """One question, asked once."""
        now_ms = _now_ms()
        wait_ms = self._bucket.take(now_ms, self._timeout_ms)
        if wait_ms is None:
            self._counts["node_rationed"] += 1
            raise NodeUnavailable(self.name, "rationed")
        if not self._breaker.lets_through(now_ms):
            raise NodeUnavailable(self.name, "resting")
        try:
            async with asyncio.timeout(seconds(self._timeout_ms)):
                await asyncio.sleep(seconds(wait_ms))
                asked_id, body = await self._post(method, params)
        except TimeoutError as exc:
            raise self._failed(method, "timeout") from exc
        except (httpx.HTTPError, httpx.StreamError) as exc:
            raise self._failed(method, "transport") from exc
        return self._read(method, asked_id, body, read)

    async def _post(self, method: str, params: Sequence[Any]) -> tuple[int, bytes]:
        self._last_id += 1
        asked_id = self._last_id
        asked = {"jsonrpc": "2.0", "id": asked_id, "method": method, "params": params}
        # No compression: what is counted is what is read.
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        async with self._client.stream(
            "POST", self._url.reveal(), content=msgspec.json.encode(asked), headers=headers
        ) as response:
            self._check_head(method, response)
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > self._bytes_max:
                    raise self._failed(method, "too_large")
        return asked_id, bytes(body)

    def _check_head(self, method: str, response: httpx.Response) -> None:
        if response.status_code == TOO_MANY_REQUESTS:
            raise self._limited(method)
        if response.status_code != 200:
            raise self._failed(method, f"http_{response.status_code}")

    def _read(self, method: str, asked_id: int, body: bytes, read: Callable[[bytes], T]) -> T:
        try:
            answer = wire.read(body, _Answer)
            if answer.error is None:
                found = read(_result(answer, asked_id))
                self._breaker.succeeded()
                return found
        except BadAnswer as exc:
            raise self._bad(exc, method) from exc
        if answer.error.code in LIMIT_CODES:
            raise self._limited(method)
        self._breaker.succeeded()  # it works, and says no
        raise NodeRefused(self.name, answer.error.code)

    def _bad(self, exc: BadAnswer, method: str) -> BadAnswer:
        self._count(method, "bad_answer", self._breaker.failed(_now_ms()))
        return exc

    def _failed(self, method: str, reason: str) -> ChainError:
        self._count(method, reason, self._breaker.failed(_now_ms()))
        return NodeUnavailable(self.name, reason)

    def _limited(self, method: str) -> ChainError:
        self._count(method, "rate_limited", self._breaker.trip(_now_ms()))
        return NodeUnavailable(self.name, "rate_limited")

    def _count(self, method: str, reason: str, has_opened: bool) -> None:
        self._counts["node_failed"] += 1
        facts = {"node": self.name, "method": method, "reason": reason}
        log.warning("chain.node_failed", extra=facts)
        if has_opened:
            log.warning("chain.node_rests", extra=facts)


def tls_context() -> ssl.SSLContext:
    """Whom we trust, the same as for providers; reading them takes a while."""
    return ssl.create_default_context()


def _result(answer: _Answer, asked_id: int) -> bytes:
    result = bytes(answer.result)
    if answer.id != asked_id or not result:
        raise BadAnswer("an answer to something else")
    return result


def _client(tls: ssl.SSLContext) -> httpx.AsyncClient:
    """A client that goes where the settings say, and nowhere else."""
    # They log each URL, and the URL of a node carries its key.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx.AsyncClient(
        verify=tls,
        trust_env=False,  # no proxies and no passwords from the environment
        follow_redirects=False,
        timeout=None,  # noqa: S113 - each question has a deadline as a whole
        limits=httpx.Limits(max_connections=CONNECTIONS_MAX),
    )


def _padded(address: str) -> str:
    return address[2:].rjust(64, "0")


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
