"""The spool: receipts that neither till nor book took, in a file of this worker's own.

One line for each receipt, with a checksum; a receipt is kept once fdatasync came back, and while
one is under way the lines of all others gather for the next. The owner of a file holds a lock on
it; one that nobody holds is a dead worker's, and spool_replay.py brings it into the book.
Failure: a disk that refuses is told (`spool.failed`) and tried again; meanwhile the receipts are
where they were, in the memory of this worker.
"""

import asyncio
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from billing.receipts import encode_receipt
from billing.settler import Settled
from config.clock import Seconds, seconds
from config.ids import id_text, new_id

log = logging.getLogger("billing.spool")

SUFFIX = ".spool"
DIGEST_BYTES = 8
# What neither store took for this long is kept, whether or not anybody waits for it.
UNTAKEN_S = seconds(1000)
LOOK_EVERY_S = seconds(1000)
RETRY_FIRST_S, RETRY_LAST_S = seconds(100), seconds(5000)
STALLED_S = seconds(5000)
# For a thread that is about to be done with the file; one that hangs keeps it.
CLOSE_WAIT_S = seconds(200)
LINES_AT_ONCE = 1000

# macOS has none; there fsync does as much.
_sync = getattr(os, "fdatasync", os.fsync)


def spool_line(receipt: bytes) -> bytes:
    """The line of a receipt's JSON, in which there are no line breaks."""
    return b"%b %b\n" % (checksum(receipt), receipt)


def checksum(receipt: bytes) -> bytes:
    return blake2b(receipt, digest_size=DIGEST_BYTES).hexdigest().encode()


class Spool:
    """The spool of one worker: `run` is a supervised task, `close` comes after it ended."""

    def __init__(
        self,
        folder: Path,
        owner: str,
        *,
        waiting_max: int,
        untaken: Callable[[Seconds], list[Settled]],
        on_result: Callable[[str, int], None],
    ) -> None:
        """owner: a name that no other worker has.

        untaken(age_s) gives the receipts that till and book did not take for that long. on_result
        is told how many receipts were `written`, and how many the disk `failed` to take.
        """
        self._folder = folder
        self._owner = owner
        self._waiting_max = waiting_max
        self._untaken = untaken
        self._on_result = on_result
        self._file: _OwnFile | None = None
        self._waiting: dict[Settled, asyncio.Future[None]] = {}
        self._written: set[Settled] = set()
        # The book refused one of its receipts, which must not vanish with the others.
        self._has_refused = False
        # A write is under way, or this worker ended before it knew of its end.
        self._is_writing = False
        self._wake = asyncio.Event()

    @property
    def uncommitted(self) -> int:
        """Receipts that were kept and that the book does not have yet."""
        return len(self._written)

    async def keep(self, settled: Settled, timeout_s: Seconds) -> bool:
        """True as soon as the receipt is on disk (or in the book), False when that takes longer."""
        if settled in self._written:
            return True
        future = self._begin(settled)
        if future is None:
            return False
        # It outlives us: whatever cancels this caller, the receipt goes on to the disk.
        await asyncio.wait([future], timeout=timeout_s)
        return future.done()

    async def keep_rest(self, timeout_s: Seconds) -> int:
        """At the end of a worker: keep all that is untaken. Returns how many are not on disk."""
        untaken = [settled for settled in self._untaken(0) if settled not in self._written]
        waits = [future for settled in untaken if (future := self._begin(settled)) is not None]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)
        return sum(1 for settled in untaken if settled not in self._written)

    async def run(self) -> None:
        """Keep what waits; empty the file whenever the book has all of it."""
        delay_s: Seconds = 0
        is_new = True  # a folder that cannot be used is told at the start, not in an emergency
        while True:
            for settled in self._untaken(UNTAKEN_S):
                if settled not in self._written:
                    self._begin(settled)
            batch = self._next_batch()
            if batch or is_new:
                is_new = False
                if not await self._is_kept(batch):
                    delay_s = min(max(delay_s * 2, RETRY_FIRST_S), RETRY_LAST_S)
                    await asyncio.sleep(delay_s)
                    continue
                delay_s = 0
            await self._empty_if_committed()
            await self._pause()

    def close(self) -> None:
        """Let the file go: it is deleted when the book has all of it, else it can be replayed."""
        self._forget_committed()
        if self._file is not None:
            is_done = not self._written and not self._has_refused and not self._is_writing
            self._file.close(delete=is_done)
            self._file = None

    def _begin(self, settled: Settled) -> asyncio.Future[None] | None:
        """None when too many wait already."""
        future = self._waiting.get(settled)
        if future is None and len(self._waiting) < self._waiting_max:
            future = self._waiting[settled] = asyncio.get_running_loop().create_future()
            self._wake.set()
        return future

    def _next_batch(self) -> list[Settled]:
        """The oldest that wait, without those that the book took meanwhile."""
        for settled in [one for one in self._waiting if _is_committed(one)]:
            self._end_wait(settled)
        return list(islice(self._waiting, LINES_AT_ONCE))

    def _end_wait(self, settled: Settled) -> None:
        future = self._waiting.pop(settled)
        if not future.done():
            future.set_result(None)

    async def _is_kept(self, batch: list[Settled]) -> bool:
        """Write and sync in a thread; False when the disk refuses."""
        # crash-point: spool.begin
        self._is_writing = True
        work = asyncio.get_running_loop().run_in_executor(None, self._write, batch)
        await asyncio.wait([work], timeout=STALLED_S)
        if not work.done():
            log.error("spool.stalled", extra={"folder": str(self._folder), "receipts": len(batch)})
        try:
            await work
        except OSError as exc:
            facts = {"folder": str(self._folder), "receipts": len(batch), "error": str(exc)}
            log.error("spool.failed", extra=facts)
            self._on_result("failed", len(batch))
            self._is_writing = False
            return False
        if batch:
            log.warning("spool.written", extra={"receipts": len(batch)})
            self._on_result("written", len(batch))
        self._written.update(batch)
        self._is_writing = False
        # crash-point: spool.done
        for settled in batch:
            self._end_wait(settled)
        return True

    def _write(self, batch: list[Settled]) -> None:
        """In a thread, one at a time. Raises OSError; then nothing of the batch counts as kept."""
        if self._file is None:
            self._file = _OwnFile(self._folder, self._owner)
        try:
            self._file.append([spool_line(encode_receipt(one.receipt)) for one in batch])
        except OSError:
            # What a failed sync left of the file is not to be trusted: the next try makes another.
            file, self._file = self._file, None
            file.close(delete=file.is_empty)
            raise

    def _forget_committed(self) -> None:
        ended = [settled for settled in self._written if settled.committed.done()]
        self._has_refused = self._has_refused or not all(map(_is_committed, ended))
        self._written.difference_update(ended)

    async def _empty_if_committed(self) -> None:
        self._forget_committed()
        file = self._file
        if self._written or file is None or file.is_empty:
            return
        if self._has_refused:
            # Whoever replays it puts aside what the book refuses.
            self._file, self._has_refused = None, False
            file.close(delete=False)
            return
        try:
            await asyncio.get_running_loop().run_in_executor(None, file.empty)
        except OSError as exc:
            log.error("spool.failed", extra={"folder": str(self._folder), "error": str(exc)})

    async def _pause(self) -> None:
        if not self._waiting:
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wake.wait()


def _is_committed(settled: Settled) -> bool:
    committed = settled.committed
    return committed.done() and committed.exception() is None


class _OwnFile:
    """A new file that is locked as long as it is open. Everything here blocks."""

    def __init__(self, folder: Path, owner: str) -> None:
        """Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder.joinpath(f"{owner}-{id_text(new_id())}{SUFFIX}")
        self._size = 0
        # A write that hangs in a thread keeps the file: closed, its number would be another file's.
        self._in_use = threading.Lock()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._fd = os.open(self._path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._path.exists():
                raise FileNotFoundError(f"{self._path}: replayed before it was locked")
            _sync_folder(folder)
        except OSError:
            os.close(self._fd)
            raise

    @property
    def is_empty(self) -> bool:
        return self._size == 0

    def append(self, lines: list[bytes]) -> None:
        """On disk when this returns. Raises OSError; what was there before is there still."""
        data = memoryview(b"".join(lines))
        with self._in_use:
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._fd, data[written:])
                _sync(self._fd)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
                raise
            self._size += len(data)

    def empty(self) -> None:
        """Not synced: a line that comes back is replayed, which changes nothing."""
        with self._in_use:
            os.ftruncate(self._fd, 0)
            self._size = 0

    def close(self, *, delete: bool) -> None:
        """Unlocked and, if wanted, deleted before that."""
        if not self._in_use.acquire(timeout=CLOSE_WAIT_S):
            return
        try:
            if delete:
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            os.close(self._fd)
            # A write that nobody waits for any more must not find another file by that number.
            self._fd = -1
        finally:
            self._in_use.release()


def _sync_folder(folder: Path) -> None:
    """The new name of a file is on disk, too."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
