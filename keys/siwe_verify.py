"""Verifies sign-in signatures, in a process of its own: `python -m keys.siwe_verify`.

The only place that has the library of the chain, which takes a second and 60 MB to import. Lines of
keys.siwe_wire come on stdin and go on stdout; the process ends with its stdin, so with its parent.
Failure: a chain that does not answer is said so; a bug answers `crashed` and is not hidden.
"""

import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
from eth_abi.exceptions import DecodingError
from siwe import InvalidSignature, SiweMessage, VerificationError
from web3.exceptions import Web3Exception

from keys.errors import ChainUnavailable
from keys.siwe_chain import Chain
from keys.siwe_message import SiweFields
from keys.siwe_signature import is_of_key
from keys.siwe_wire import Answer, Question, Terms, Verdict

# Chains are slow: who waits for one keeps nobody waiting whose wallet is a key.
CHAIN_THREADS = 4
CHAIN_WAITING_MAX = 16


class Verifier:
    """Answers questions; those about keys at once, those about contracts from a few threads."""

    def __init__(self, terms: Terms, out: int) -> None:
        self._terms = terms
        self._out = out
        self._writing = threading.Lock()
        self._pool = ThreadPoolExecutor(CHAIN_THREADS)
        self._room = threading.BoundedSemaphore(CHAIN_THREADS + CHAIN_WAITING_MAX)

    def take(self, question: Question) -> None:
        """Answer a question, now or later."""
        message = build_message(question)
        if message is None:
            self.say(Answer(id=question.id, verdict="refused", detail="printed otherwise"))
        elif is_of_key(question.signature) and _is_signed(message, question, None):
            self.say(Answer(id=question.id, verdict="key"))
        elif not self._terms.rpc_urls:
            # A wallet of a key whose signature is wrong needs no chain to be told so.
            verdict: Verdict = "refused" if is_of_key(question.signature) else "no_chain"
            self.say(Answer(id=question.id, verdict=verdict))
        elif not self._room.acquire(blocking=False):
            self.say(Answer(id=question.id, verdict="busy"))
        else:
            # From now on, so that waiting for a thread counts: whoever answers after the worker's
            # patience is taken for stuck and killed, with all who wait for keys alone.
            due = time.monotonic() + 2 * self._terms.timeout_s
            asked = self._pool.submit(self._ask_chain, message, question, due)
            asked.add_done_callback(lambda future: self._end(question.id, future))

    def _ask_chain(self, message: SiweMessage, question: Question, due: float) -> Verdict:
        chain = Chain(self._terms.rpc_urls, self._terms.timeout_s, due)
        try:
            return "contract" if _is_signed(message, question, chain) else "refused"
        except ChainUnavailable:
            return "chain_away"

    def _end(self, question_id: int, asked: "Future[Verdict]") -> None:
        self._room.release()
        crash = asked.exception()
        if crash is None:
            self.say(Answer(id=question_id, verdict=asked.result()))
        else:
            detail = type(crash).__name__
            self.say(Answer(id=question_id, verdict="crashed", detail=detail))

    def say(self, answer: Answer) -> None:
        line = msgspec.json.encode(answer) + b"\n"
        with self._writing:
            os.write(self._out, line)


def build_message(question: Question) -> SiweMessage | None:
    """The library's message of the parts; None when it does not print back to the bytes."""
    try:
        message = SiweMessage(**_arguments(question.fields))
    except ValueError:  # pydantic's errors are of this kind
        return None
    return message if message.prepare_message() == question.text else None


def _arguments(fields: SiweFields) -> dict[str, object]:
    arguments = msgspec.structs.asdict(fields)
    if fields.resources is not None:
        arguments["resources"] = list(fields.resources)
    return arguments


def _is_signed(message: SiweMessage, question: Question, chain: Chain | None) -> bool:
    """Let the library decide. Without domain and nonce it would let anything of theirs pass."""
    assert question.domain
    assert question.nonce
    try:
        message.verify(
            question.signature,
            scheme=question.scheme if question.fields.scheme is not None else None,
            domain=question.domain,
            nonce=question.nonce,
            uri=question.fields.uri,
            chain_id=question.fields.chain_id,
            timestamp=question.at,
            provider=chain,
            strict=True,
        )
    except (InvalidSignature, VerificationError):
        return False
    except (Web3Exception, DecodingError, ValueError, TypeError, OverflowError):
        # What a contract answered could not be read as a yes.
        return False
    return True


def main() -> None:
    """Serve the parent until it goes."""
    lines = sys.stdin.buffer
    terms = msgspec.json.decode(lines.readline(), type=Terms)
    verifier = Verifier(terms, sys.stdout.fileno())
    verifier.say(Answer(id=0, verdict="key"))
    questions = msgspec.json.Decoder(Question)
    for line in lines:
        verifier.take(questions.decode(line))
    # Threads may still wait for a chain: nobody does for them.
    os._exit(0)


if __name__ == "__main__":
    main()
