"""What the relay needs of a provider, and nothing of how it is reached."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from config.secret import Secret


class UpstreamRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call as it goes out. `model` is the provider's own name for it."""

    path: str
    model: str
    body: bytes
    stream: bool
    request_id: str
    own_key: Secret | None = None
    """The caller's own credential, instead of the provider's key."""


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

    def header(self, name: str) -> str | None:
        """The first header of that lower-case name; bytes that are no UTF-8 come as surrogates."""

    def whole(self) -> bytes | None:
        """All of the body when it is there already and nothing of it was read, else None."""

    async def read(self) -> bytes:
        """The next bytes of the body as they arrive, b'' at its proper end.

        Cancelling loses no bytes. Raises UpstreamFailed when the body broke off.
        """

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        """Hand each piece of the body to take at the moment it arrives, without waking the caller.

        Returns True as soon as take said False (it has that piece; the rest waits for the next
        pump or read), False at the body's proper end. take is called from the event loop, must
        not block and must not raise. Not while another read or pump is under way. Cancelling
        loses no bytes. Raises UpstreamFailed when the body broke off.
        """

    def close(self) -> None:
        """Give the connection back, or drop it when the body was not read to its end."""


class Upstream(Protocol):
    """A provider."""

    async def send(self, request: UpstreamRequest) -> UpstreamReply:
        """Send and wait for the head. Raises UpstreamFailed. Cancelling drops the connection."""

    async def close(self) -> None:
        """Close all connections."""
