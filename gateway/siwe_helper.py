"""The worker's end of the verifying process: starts it when it is first needed, and again.

The process shares nothing with the worker but two pipes, and gets no environment: it talks to nodes
that answer what strangers' contracts say. It ends when the worker does.
Failure: VerifierUnavailable when too many wait, or no answer comes in time; then the process is
replaced.
"""

import asyncio
import contextlib
import logging
import sys
from asyncio.subprocess import PIPE, Process
from itertools import count

import msgspec
from msgspec.structs import replace

from gateway.supervise import Tasks
from keys.errors import VerifierUnavailable
from keys.siwe_wire import Answer, Question, Terms

log = logging.getLogger("keys.verifier")

COMMAND = (sys.executable, "-I", "-m", "keys.siwe_verify")
READY_WITHIN_S = 30.0
LINE_BYTES_MAX = 4096
END_WITHIN_S = 2.0


class _Helper:
    """One process and the questions that it has not answered."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.waiting: dict[int, asyncio.Future[Answer]] = {}
        self.is_dead = False

    def ask(self, question: Question) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting[question.id] = future
        future.add_done_callback(lambda _: self.waiting.pop(question.id, None))
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(question) + b"\n")
        return future

    async def read(self) -> None:
        """Hand out answers until the process is gone; whoever waits then is told."""
        answers = msgspec.json.Decoder(Answer)
        assert self.process.stdout is not None
        try:
            while line := await self.process.stdout.readline():
                answer = answers.decode(line)
                future = self.waiting.get(answer.id)
                if future is not None and not future.done():
                    future.set_result(answer)
        except ValueError:  # a line that is too long, or none of ours
            log.warning("login.verifier_garbled")
        finally:
            self.end()

    def end(self) -> None:
        """Kill it; whoever waits gets VerifierUnavailable."""
        self.is_dead = True
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        for future in list(self.waiting.values()):
            if not future.done():
                future.set_exception(VerifierUnavailable())
                future.exception()


class SiweHelper:
    """Asks the process. One for each worker."""

    def __init__(self, terms: Terms, tasks: Tasks, *, timeout_s: float, pending_max: int) -> None:
        self._terms = terms
        self._tasks = tasks
        self._timeout_s = timeout_s
        self._pending_max = pending_max
        self._pending = 0
        self._ids = count(1)
        self._helper: _Helper | None = None
        self._starting: asyncio.Task[_Helper | None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, when there is one."""
        return None if self._helper is None else self._helper.process.pid

    def warm(self) -> None:
        """Begin to start the process, for somebody who will ask in a moment."""
        if self._starting is None and (self._helper is None or self._helper.is_dead):
            self._starting = self._tasks.start(self._start(), "login.verifier")
            self._starting.add_done_callback(self._started)

    def _started(self, _: object) -> None:
        self._starting = None

    async def verify(self, question: Question) -> Answer:
        """The verdict on a question, whose id is given here. Raises VerifierUnavailable."""
        if self._pending >= self._pending_max:
            raise VerifierUnavailable
        self._pending += 1
        try:
            try:
                return await self._ask(question)
            except VerifierUnavailable:
                # The process died in the middle. Asking changes nothing, so it is asked once more.
                return await self._ask(question)
        finally:
            self._pending -= 1

    async def _ask(self, question: Question) -> Answer:
        helper = await self._ready()
        asked = helper.ask(replace(question, id=next(self._ids)))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asked
        except TimeoutError as exc:
            log.warning("login.verifier_stuck", extra={"pid": helper.process.pid})
            helper.end()
            raise VerifierUnavailable from exc

    async def _ready(self) -> _Helper:
        if self._helper is None or self._helper.is_dead:
            self.warm()
            if self._starting is not None:
                await asyncio.wait([self._starting], timeout=READY_WITHIN_S)
        if self._helper is None or self._helper.is_dead:
            raise VerifierUnavailable
        return self._helper

    async def _start(self) -> _Helper | None:
        """A process that said that it is ready; None when it did not in time."""
        # A session of its own: what a terminal sends to stop the worker is not for it.
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=PIPE,
            stdout=PIPE,
            env={},
            limit=LINE_BYTES_MAX,
            start_new_session=True,
        )
        helper = _Helper(process)
        assert process.stdin is not None
        ready: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        helper.waiting[0] = ready
        process.stdin.write(msgspec.json.encode(self._terms) + b"\n")
        self._tasks.start(self._watch(helper), "login.verifier")
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                await ready
        except (TimeoutError, VerifierUnavailable):
            log.error("login.verifier_failed", extra={"pid": process.pid})
            helper.end()
            return None
        helper.waiting.pop(0)
        self._helper = helper
        log.info("login.verifier_started", extra={"pid": process.pid})
        return helper

    async def _watch(self, helper: _Helper) -> None:
        """Read its answers; reap it when it is gone."""
        try:
            await helper.read()
        finally:
            helper.end()
            await helper.process.wait()
        log.info("login.verifier_ended", extra={"pid": helper.process.pid})
