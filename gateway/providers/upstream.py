"""What the relay needs of a provider, and nothing of how it is reached."""

from collections.abc import Mapping
from typing import Protocol

import msgspec


class UpstreamRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call as it goes out. `model` is the provider's own name for it."""

    path: str
    model: str
    body: bytes
    stream: bool
    request_id: str


class UpstreamFailed(Exception):
    """The provider could not be reached or broke off.

    may_have_billed is False only when not a byte of the request can have been read.
    """

    def __init__(self, reason: str, *, may_have_billed: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_have_billed = may_have_billed


class UpstreamReply(Protocol):
    """An answer whose head has arrived."""

    status: int
    headers: Mapping[str, str]

    async def read(self) -> bytes:
        """The next bytes of the body as they arrive, b'' at its proper end.

        Cancelling loses no bytes. Raises UpstreamFailed when the body broke off.
        """

    def close(self) -> None:
        """Give the connection back, or drop it when the body was not read to its end."""


class Upstream(Protocol):
    """A provider."""

    async def send(self, request: UpstreamRequest) -> UpstreamReply:
        """Send and wait for the head. Raises UpstreamFailed. Cancelling drops the connection."""

    async def close(self) -> None:
        """Close all connections."""
