"""Both stores for one command: external ones, those of a running process, or embedded ones.

One process owns the embedded stores of a data folder: it holds `stores.lock` as long as it lives
and publishes the addresses in `stores.json` (0600). Other commands on that folder attach to them
and lose them when the owner stops.

Failure: StoreStartFailed, StoresInUse, StoresNotRunning, StoreUnsupported.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gateway.embedded.errors import StoresInUse, StoresNotRunning, StoreUnsupported

if TYPE_CHECKING:
    from gateway.embedded.server import EmbeddedServer

ATTACH_S = 40.0
OWN_S = 0.3  # a look at the lock by a command that then attaches is shorter
INTERVAL_S = 0.05


@dataclass(frozen=True)
class StoreUrls:
    """Where the book (Postgres) and the till (Valkey) answer. URLs carry passwords."""

    book_url: str = field(repr=False)
    till_url: str = field(repr=False)
    pids: dict[str, int]
    """Of the embedded servers, by name: postgres, valkey."""
    embedded: bool
    """Whether at least one of the two is embedded, launched by us or by the process attached to."""


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stores.json says. An empty URL: the owner did not launch that one."""

    owner_pid: int
    book_url: str
    till_url: str
    pids: dict[str, int]


@asynccontextmanager
async def open_stores(
    data_dir: Path,
    book_url: str = "",
    till_url: str = "",
    *,
    may_launch: bool = True,
    own: bool = False,
    book_settings: Mapping[str, str] | None = None,
) -> AsyncIterator[StoreUrls]:
    """Give both stores as long as the context is open.

    A URL that is given is used as it is. For the rest: attach to a running owner of data_dir, or
    become the owner and stop the servers at the end. own=True never attaches: StoresInUse.
    may_launch=False never launches: StoresNotRunning.
    """
    if book_url and till_url:
        yield StoreUrls(book_url, till_url, {}, embedded=False)
        return
    if sys.platform == "win32":
        raise StoreUnsupported(sys.platform)
    from gateway.embedded.server import open_lock

    data_dir = _prepared(data_dir, may_launch)
    with open_lock(data_dir / "stores.lock") as lock:
        there = await _find_owner(lock.fileno(), data_dir, own)
        if there is not None:
            yield _merged(there, book_url, till_url, data_dir)
            return
        if not may_launch:
            raise StoresNotRunning(data_dir)
        servers = _servers(data_dir, bool(book_url), bool(till_url), book_settings)
        async with _launched(data_dir, lock.fileno(), servers) as published:
            yield _merged(published, book_url, till_url, data_dir)


def _prepared(data_dir: Path, may_launch: bool) -> Path:
    if not may_launch and not data_dir.exists():
        raise StoresNotRunning(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return data_dir.absolute()


async def _find_owner(lock: int, data_dir: Path, own: bool) -> Published | None:
    """The owner's stores once they answer, or None when we are the owner now."""
    from gateway.embedded.server import locked

    deadline = time.monotonic() + (OWN_S if own else ATTACH_S)
    while not locked(lock):
        there = None if own else _published(data_dir)
        if there is not None and await _answers(there):
            return there
        if time.monotonic() > deadline:
            raise StoresInUse(_owner_pid(lock), data_dir)
        await asyncio.sleep(INTERVAL_S)
    return None


def _published(data_dir: Path) -> Published | None:
    """What a living owner wrote; a file that a killed owner left does not count."""
    try:
        text = (data_dir / "stores.json").read_bytes()
        there = msgspec.json.decode(text, type=Published)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return there if _lives(there.owner_pid) else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's process
    return True


async def _answers(there: Published) -> bool:
    from gateway.embedded import postgres, valkey

    book = not there.book_url or await postgres.answers(there.book_url)
    return book and (not there.till_url or await valkey.answers(there.till_url))


def _owner_pid(lock: int) -> int:
    return int(os.pread(lock, 20, 0) or b"0")


def _merged(there: Published, book_url: str, till_url: str, data_dir: Path) -> StoreUrls:
    book, till = book_url or there.book_url, till_url or there.till_url
    if not book or not till:
        # The owner was started with an external URL for the store that we want embedded.
        raise StoresInUse(there.owner_pid, data_dir)
    return StoreUrls(book, till, there.pids, embedded=True)


def _servers(
    data_dir: Path, has_book: bool, has_till: bool, book_settings: Mapping[str, str] | None
) -> dict[str, "EmbeddedServer"]:
    from gateway.embedded.identity import let_through, usual_identity
    from gateway.embedded.postgres import EmbeddedPostgres
    from gateway.embedded.valkey import EmbeddedValkey

    let_through(data_dir, usual_identity())
    servers: dict[str, EmbeddedServer] = {}
    if not has_book:
        servers["postgres"] = EmbeddedPostgres(data_dir / "postgres", settings=book_settings)
    if not has_till:
        servers["valkey"] = EmbeddedValkey(data_dir / "valkey")
    return servers


@asynccontextmanager
async def _launched(
    data_dir: Path, lock: int, servers: Mapping[str, "EmbeddedServer"]
) -> AsyncIterator[Published]:
    from gateway.embedded.server import uninterrupted, write_secret

    address = data_dir / "stores.json"
    address.unlink(missing_ok=True)
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    try:
        await _start_all(servers)
        urls = {name: server.local_url for name, server in servers.items()}
        published = Published(
            owner_pid=os.getpid(),
            book_url=urls.get("postgres", ""),
            till_url=urls.get("valkey", ""),
            pids={name: server.pid for name, server in servers.items()},
        )
        write_secret(address, msgspec.json.encode(published).decode())
        yield published
    finally:
        address.unlink(missing_ok=True)
        await uninterrupted(_stop_all(servers))


async def _start_all(servers: Mapping[str, "EmbeddedServer"]) -> None:
    """Start concurrently; the first failure cancels the other start, which cleans up."""
    starts = [asyncio.ensure_future(server.start()) for server in servers.values()]
    try:
        await asyncio.gather(*starts)
    finally:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


async def _stop_all(servers: Mapping[str, "EmbeddedServer"]) -> None:
    stops = (server.stop() for server in servers.values())
    for failure in await asyncio.gather(*stops, return_exceptions=True):
        if isinstance(failure, BaseException):
            raise failure
