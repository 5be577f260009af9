"""What nodes answer, read strictly. Pure.

Fields that no rule of ours needs are skipped; whatever else differs from the specification is
BadAnswer: https://ethereum.github.io/execution-apis/
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from billing.chain.errors import BadAnswer

T = TypeVar("T")
# \Z, as $ would also take a line break at the end.
_Hash = Annotated[str, Meta(pattern=r"^0x[0-9a-fA-F]{64}\Z")]
_Address = Annotated[str, Meta(pattern=r"^0x[0-9a-fA-F]{40}\Z")]
_Bytes = Annotated[str, Meta(pattern=r"^0x([0-9a-fA-F]{2})*\Z")]
# 63 bits: what Postgres keeps.
_Quantity = Annotated[str, Meta(pattern=r"^0x(0|[1-9a-f][0-9a-f]{0,14}|[1-7][0-9a-f]{15})\Z")]
_Word = Annotated[str, Meta(pattern=r"^0x[0-9a-fA-F]{64}\Z")]
LOGS_MAX = 20_000
# Of the year 9999.
SECONDS_MAX = 253_402_300_799


class Log(Struct, frozen=True, kw_only=True):
    """One event; hexadecimal digits in lower case."""

    address: str
    topics: tuple[str, ...]
    data: str
    removed: bool = False


class Receipt(Struct, frozen=True, kw_only=True):
    """How a transaction ended, with its logs in order."""

    tx_hash: str
    block_number: int
    block_hash: str
    status: int
    logs: tuple[Log, ...]


class Block(Struct, frozen=True, kw_only=True):
    number: int
    hash: str
    time: datetime


class Heads(Struct, frozen=True, kw_only=True):
    """Numbers of blocks; None: not known, or no evidence."""

    latest: int
    safe: int | None = None
    finalized: int | None = None


class FoundLog(Struct, frozen=True, kw_only=True, order=True):
    """A transfer to the treasury as a search finds it: it only says where to look."""

    block_number: int
    log_index: int
    tx_hash: str
    units: int


class _RawLog(Struct, rename="camel"):
    address: _Address
    topics: Annotated[tuple[_Hash, ...], Meta(max_length=4)]
    data: _Bytes
    block_hash: _Hash
    block_number: _Quantity
    transaction_hash: _Hash
    log_index: _Quantity
    removed: bool = False


class _RawReceipt(Struct, rename="camel"):
    transaction_hash: _Hash
    block_hash: _Hash
    block_number: _Quantity
    status: Literal["0x0", "0x1"]
    logs: Annotated[list[_RawLog], Meta(max_length=LOGS_MAX)]


class _RawBlock(Struct, rename="camel"):
    number: _Quantity
    hash: _Hash
    timestamp: _Quantity


def read(raw: bytes, kind: type[T]) -> T:
    """Raises BadAnswer."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise BadAnswer(f"no {kind!r}".lower()) from exc


def receipt_reader(tx_hash: str) -> Callable[[bytes], Receipt | None]:
    """Reads the receipt of this transaction, None when there is none."""

    def read_receipt(raw: bytes) -> Receipt | None:
        if raw.strip() == b"null":
            return None
        found = read(raw, _RawReceipt)
        if found.transaction_hash.lower() != tx_hash:
            raise BadAnswer("receipt of another transaction")
        return _receipt(found)

    return read_receipt


def _receipt(found: _RawReceipt) -> Receipt:
    place = _place(found.block_hash, found.block_number, found.transaction_hash)
    previous = -1
    for log in found.logs:
        if _place(log.block_hash, log.block_number, log.transaction_hash) != place:
            raise BadAnswer("log of another receipt")
        # Our ordinals are positions: logs out of order, or missing in between, would change them.
        index = int(log.log_index, 16)
        if index != previous + 1 and previous >= 0:
            raise BadAnswer("logs out of order")
        previous = index
    return Receipt(
        tx_hash=found.transaction_hash.lower(),
        block_number=int(found.block_number, 16),
        block_hash=found.block_hash.lower(),
        status=int(found.status, 16),
        logs=tuple(map(_log, found.logs)),
    )


def _place(block_hash: str, block_number: str, tx_hash: str) -> tuple[str, int, str]:
    return block_hash.lower(), int(block_number, 16), tx_hash.lower()


def _log(log: _RawLog) -> Log:
    return Log(
        address=log.address.lower(),
        topics=tuple(topic.lower() for topic in log.topics),
        data=log.data.lower(),
        removed=log.removed,
    )


def read_block(raw: bytes) -> Block | None:
    """None when the node has no such block."""
    if raw.strip() == b"null":
        return None
    found = read(raw, _RawBlock)
    seconds = int(found.timestamp, 16)
    if seconds > SECONDS_MAX:
        raise BadAnswer("a time without a date")
    return Block(
        number=int(found.number, 16),
        hash=found.hash.lower(),
        time=datetime.fromtimestamp(seconds, UTC),
    )


def logs_reader(
    token: str, topics: tuple[str | None, ...], first: int, last: int
) -> Callable[[bytes], tuple[FoundLog, ...]]:
    """Reads what a search for these transfers may find, in order."""

    def read_logs(raw: bytes) -> tuple[FoundLog, ...]:
        found: list[FoundLog] = []
        for log in read(raw, list[_RawLog]):
            number = int(log.block_number, 16)
            is_one = (
                log.address.lower() == token
                and len(log.topics) == 3
                and topics == (log.topics[0].lower(), None, log.topics[2].lower())
                and first <= number <= last
                and len(log.data) == 66
                and not log.removed
            )
            if not is_one:
                raise BadAnswer("logs that were not asked for")
            found.append(
                FoundLog(
                    block_number=number,
                    log_index=int(log.log_index, 16),
                    tx_hash=log.transaction_hash.lower(),
                    units=int(log.data, 16),
                )
            )
        return tuple(sorted(set(found)))

    return read_logs


def read_number(raw: bytes) -> int:
    return int(read(raw, _Quantity), 16)


def read_word(raw: bytes) -> int:
    """The one word that a call of a contract returned."""
    return int(read(raw, _Word), 16)


def read_has_code(raw: bytes) -> bool:
    return read(raw, _Bytes) != "0x"
