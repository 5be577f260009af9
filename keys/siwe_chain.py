"""The chain as the sign-in library sees it: three methods, a cap on gas, a deadline, no detours.

Contracts are written by strangers, so a node is asked only what the check needs. The provider of
web3 would repeat questions, and fetch a URL that a contract names (EIP-3668).
Failure: ChainUnavailable when no node answers in time.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any, cast

from web3.providers.base import JSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from keys.errors import ChainUnavailable

METHODS = ("eth_chainId", "eth_call", "eth_getCode")
# Enough to deploy a wallet and to check a passkey in Solidity; a loop ends soon.
GAS_MAX = 10_000_000
ANSWER_BYTES_MAX = 1024 * 1024
_CHUNK = 64 * 1024


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Chain(JSONBaseProvider):
    """One verification's questions to the nodes: timeout_s for each, and all until due."""

    def __init__(self, rpc_urls: tuple[str, ...], timeout_s: float, due: float) -> None:
        """due: a time.monotonic()."""
        super().__init__()
        # A contract's answer is never a URL to fetch.
        self.global_ccip_read_enabled = False
        self._urls = rpc_urls
        self._timeout_s = timeout_s
        self._all_due = due
        self._opener = urllib.request.build_opener(_NoRedirect)

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """The first answer of a node. Raises ChainUnavailable."""
        if method not in METHODS:
            raise ChainUnavailable
        if method == "eth_call":
            params = [{**params[0], "gas": hex(GAS_MAX)}, *params[1:]]
        body = self.encode_rpc_request(method, params)
        due = min(time.monotonic() + self._timeout_s, self._all_due)
        for url in self._urls:
            answer = self._ask(url, body, due)
            if answer is not None:
                return answer
        raise ChainUnavailable

    def _ask(self, url: str, body: bytes, due: float) -> RPCResponse | None:
        """None when this node gave no answer that can be read."""
        left_s = due - time.monotonic()
        if left_s <= 0:
            return None
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(url, body, headers)  # noqa: S310 - from the settings
        try:
            with self._opener.open(request, timeout=left_s) as response:
                answer = json.loads(_read(response, due))
        except (OSError, ValueError, http.client.HTTPException, RecursionError):
            return None
        is_whole = isinstance(answer, dict) and ("result" in answer or "error" in answer)
        return cast("RPCResponse", answer) if is_whole else None


def _read(response: Any, due: float) -> bytes:
    """All of a body, unless it is too much or too slow."""
    parts, size = [], 0
    while part := response.read1(_CHUNK):
        size += len(part)
        if size > ANSWER_BYTES_MAX or time.monotonic() > due:
            raise ValueError
        parts.append(part)
    return b"".join(parts)
