"""Bring what dead workers left in their spools into the book.

Replaying is safe to repeat and safe beside others: a file is locked while it is read, and a receipt
that the book has changes nothing.
Failure: a file that could not be finished stays and is counted as `left`. Lines that are torn or
broken, and receipts that the book refuses, go to `<name>.bad`, are told, and stop nothing.
"""

import asyncio
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import msgspec

from billing.book import BookRefused
from billing.errors import BillingError
from billing.receipts import ChargeReceipt, decode_receipt
from billing.spool import SUFFIX, checksum

log = logging.getLogger("billing.spool")

BAD_SUFFIX = ".bad"
BATCH_MAX = 256
# A receipt has far less; what is longer is no line of ours and comes in pieces.
LINE_BYTES_MAX = 256 * 1024

Post = Callable[[list[ChargeReceipt]], Awaitable[object]]
"""Posts into the book and tells the till, as `Sweeper.post` does, and raises what it raises."""


class Replayed(msgspec.Struct, kw_only=True):
    """What a replay did."""

    files: int = 0
    """Files that are done and deleted."""
    receipts: int = 0
    """Receipts that are in the book now, those included that were before."""
    bad: int = 0
    """Lines that are no receipt (any more)."""
    refused: int = 0
    """Receipts that the book refuses for good."""
    left: int = 0
    """Files that have to be replayed again: the book or the disk did not answer."""


async def replay_spool(folder: Path, post: Post) -> Replayed:
    """Replay every file of the folder that nobody owns. Raises nothing that may pass."""
    done = Replayed()
    for path in await asyncio.to_thread(_spools, folder):
        try:
            file = await asyncio.to_thread(_take, path)
            if file is None:
                continue
            with file:
                await _Replay(path, file, post, done).run()
        except BillingError as exc:
            done.left += 1
            cause = repr(exc.__cause__ or exc)
            log.warning("spool.replay_waits", extra={"file": str(path), "error": cause})
        except OSError as exc:
            done.left += 1
            log.error("spool.replay_failed", extra={"file": str(path), "error": str(exc)})
    return done


class _Replay:
    """The replay of one file."""

    def __init__(self, path: Path, file: BinaryIO, post: Post, done: Replayed) -> None:
        self._path = path
        self._file = file
        self._post = post
        self._done = done
        self._mine = Replayed()
        self._aside: list[bytes] = []

    async def run(self) -> None:
        """Raises BillingError when the book is away, OSError when the disk is."""
        while lines := await asyncio.to_thread(self._read):
            await self._post_some([found for line in lines if (found := self._receipt(line))])
        # crash-point: replay.posted
        await asyncio.to_thread(self._finish)
        mine, done = self._mine, self._done
        done.files += 1
        done.receipts += mine.receipts
        done.bad += mine.bad
        done.refused += mine.refused
        facts = {"file": str(self._path), "receipts": mine.receipts, "refused": mine.refused}
        if mine.bad:
            log.error("spool.lines_bad", extra={"file": str(self._path), "lines": mine.bad})
        if mine.receipts or mine.refused:
            log.info("spool.replayed", extra=facts)

    def _read(self) -> list[bytes]:
        return list(islice(_lines(self._file), BATCH_MAX))

    def _receipt(self, line: bytes) -> tuple[bytes, ChargeReceipt] | None:
        """The receipt of a line; None when it is not to be trusted, and then it is put aside."""
        said, _, data = line.removesuffix(b"\n").partition(b" ")
        if line.endswith(b"\n") and said == checksum(data):
            try:
                return line, decode_receipt(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                pass  # another release's, or no receipt at all
        self._mine.bad += 1
        self._aside.append(line)
        return None

    async def _post_some(self, found: Sequence[tuple[bytes, ChargeReceipt]]) -> None:
        if not found:
            return
        # crash-point: replay.begin
        try:
            await self._post([receipt for _, receipt in found])
        except BookRefused as exc:
            if len(found) > 1:
                # One is at fault: find it, so that it holds up nobody else.
                for one in found:
                    await self._post_some([one])
                return
            self._mine.refused += 1
            self._aside.append(found[0][0])
            facts = {"request_id": f"req_{found[0][1].source_reference}", "reason": exc.reason}
            log.error("spool.receipt_refused", extra={"file": str(self._path), **facts})
        else:
            self._mine.receipts += len(found)

    def _finish(self) -> None:
        """Put aside what was not posted, on disk, before the file goes."""
        if self._aside:
            # Whole, and over one that an interrupted replay of the same file left.
            fd = os.open(f"{self._path}{BAD_SUFFIX}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "wb") as bad:
                bad.writelines(self._aside)
                bad.flush()
                os.fsync(bad.fileno())
        self._path.unlink()


def _spools(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _take(path: Path) -> BinaryIO | None:
    """The file, locked; None when somebody owns it or it is gone. Raises OSError."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock before may have deleted it.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES_MAX):
        yield line
