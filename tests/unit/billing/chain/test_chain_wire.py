"""What nodes may answer; anything else is no answer."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing.chain.errors import BadAnswer
from billing.chain.wire import (
    Block,
    FoundLog,
    logs_reader,
    read_block,
    read_has_code,
    read_number,
    read_word,
    receipt_reader,
)

TX, OTHER, BLOCK = "0x" + "12" * 32, "0x" + "34" * 32, "0x" + "Bb" * 32
TOKEN = "0x" + "70" * 20
TOPICS = ["0x" + "dd" * 32, "0x" + "a1" * 32, "0x" + "7e" * 32]


def raw_log(index: int, **changed: object) -> dict[str, object]:
    return {
        "address": TOKEN.upper().replace("0X", "0x"),
        "topics": TOPICS,
        "data": f"0x{index:064x}",
        "blockHash": BLOCK,
        "blockNumber": "0x64",
        "transactionHash": TX,
        "logIndex": hex(index),
        **changed,
    }


def raw_receipt(*logs: dict[str, object], **changed: object) -> bytes:
    fields = {"transactionHash": TX, "blockHash": BLOCK, "blockNumber": "0x64", "status": "0x1"}
    return msgspec.json.encode({**fields, "logs": logs, "type": "0x2", **changed})


def test_a_receipt_is_read_in_lower_case_with_its_logs_in_order():
    found = receipt_reader(TX)(raw_receipt(raw_log(7), raw_log(8)))

    assert found is not None
    assert (found.tx_hash, found.block_number, found.status) == (TX, 100, 1)
    assert found.block_hash == BLOCK.lower()
    assert [int(log.data, 16) for log in found.logs] == [7, 8]
    assert {log.address for log in found.logs} == {TOKEN}
    assert receipt_reader(TX)(b" null ") is None


@pytest.mark.parametrize(
    "raw",
    [
        raw_receipt(transactionHash=OTHER),
        raw_receipt(raw_log(8), raw_log(7)),
        raw_receipt(raw_log(7), raw_log(7)),
        raw_receipt(raw_log(7), raw_log(9)),
        raw_receipt(raw_log(7, transactionHash=OTHER)),
        raw_receipt(raw_log(7, blockHash=OTHER)),
        raw_receipt(raw_log(7, blockNumber="0x65")),
        raw_receipt(raw_log(7, topics=[*TOPICS, *TOPICS])),
        raw_receipt(raw_log(7, topics=["0x12"])),
        raw_receipt(raw_log(7, address=TOKEN + "\n")),
        raw_receipt(raw_log(7, removed=None)),
        raw_receipt(raw_log(7, data="0x123")),
        raw_receipt(raw_log(7, data="0x12\n")),
        raw_receipt(status="0x2"),
        raw_receipt(status=1),
        raw_receipt(blockHash=None),
        raw_receipt(blockNumber=None),
        raw_receipt(blockNumber="0x064"),
        raw_receipt(blockNumber="0x" + "f" * 16),
        raw_receipt(logs=None),
        b"",
        b"nul",
        b"{}",
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_receipt_that_is_odd_in_anything_is_no_receipt(raw):
    with pytest.raises(BadAnswer):
        receipt_reader(TX)(raw)


READERS = (
    receipt_reader(TX),
    read_block,
    read_number,
    read_word,
    read_has_code,
    logs_reader(TOKEN, (TOPICS[0], None, TOPICS[2]), 1, 200),
)


@given(st.binary() | st.text().map(str.encode), st.sampled_from(READERS))
@example(b'"\\ud800"', read_number)
def test_any_bytes_are_read_or_refused(raw, read):
    try:
        read(raw)
    except BadAnswer:
        return


def test_a_block_has_a_date():
    raw = {"number": "0x64", "hash": BLOCK, "timestamp": "0x6956b100", "transactions": [TX]}

    found = read_block(msgspec.json.encode(raw))
    assert found == Block(
        number=100, hash=BLOCK.lower(), time=datetime.fromtimestamp(0x6956B100, UTC)
    )
    assert read_block(b"null") is None
    for odd in ("0x3afff44180", "0x7fffffffffffffff", None, -1):
        with pytest.raises(BadAnswer):
            read_block(msgspec.json.encode(raw | {"timestamp": odd}))


def test_a_search_answers_what_was_asked_for():
    read = logs_reader(TOKEN, (TOPICS[0], None, TOPICS[2]), 100, 100)

    found = read(msgspec.json.encode([raw_log(9), raw_log(8), raw_log(9)]))
    assert found == tuple(
        FoundLog(block_number=100, log_index=at, tx_hash=TX, units=at) for at in (8, 9)
    )
    odd = (
        {"address": "0x" + "71" * 20},
        {"topics": [TOPICS[0], TOPICS[1], TOPICS[1]]},
        {"topics": TOPICS[:2]},
        {"blockNumber": "0x65"},
        {"data": "0x"},
        {"removed": True},
    )
    for changed in odd:
        with pytest.raises(BadAnswer):
            read(msgspec.json.encode([raw_log(8, **changed)]))


def test_numbers_and_words_are_read_exactly():
    assert read_number(b'"0x2105"') == 8453
    assert read_word(b'"0x' + b"f" * 64 + b'"') == 2**256 - 1
    assert (read_has_code(b'"0x"'), read_has_code(b'"0x60"')) == (False, True)
    for raw in (b"8453", b'"8453"', b'"0x02105"', b'"0x"', b'""', b"null"):
        with pytest.raises(BadAnswer):
            read_number(raw)
    for raw in (b'"0x"', b'"0x6"', b'"0x' + b"0" * 128 + b'"'):
        with pytest.raises(BadAnswer):
            read_word(raw)
