"""What a receipt proves: by its logs alone, each by itself, and never by garbage."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing.chain.errors import BadAnswer, HashMalformed
from billing.chain.transfer import Transfer, predates, transfer_nanos
from billing.chain.verify import (
    TRANSFER_TOPIC,
    UNITS_PER_USD,
    ZERO_ADDRESS,
    ChainRules,
    Code,
    Suspense,
    Verdict,
    chain_rules,
    is_deep_enough,
    read_hash,
    verdict,
)
from billing.chain.wire import Block, Heads, Log, Receipt, receipt_reader
from config.secret import Secret
from config.settings import Chain

TOKEN, TREASURY, SWEEP = "0x" + "70" * 20, "0x" + "7e" * 20, "0x" + "53" * 20
ALICE, BOB = "0x" + "a1" * 20, "0x" + "b0" * 20
TX, BLOCK_HASH = "0x" + "12" * 32, "0x" + "bb" * 32
RULES = ChainRules(chain_id=8453, token=TOKEN, treasury=TREASURY, sweeps=frozenset({SWEEP}))
BLOCK = Block(number=100, hash=BLOCK_HASH, time=datetime(2026, 1, 1, tzinfo=UTC))
FINAL = Heads(latest=1000, safe=900, finalized=800)
WORD = "0x" + "00" * 32


def topic(address: str) -> str:
    return "0x" + address[2:].rjust(64, "0")


def data(units: int) -> str:
    return f"0x{units:064x}"


def moved(sender: str, to: str, units: int, **changed: object) -> Log:
    topics = (TRANSFER_TOPIC, topic(sender), topic(to))
    log = Log(address=TOKEN, topics=topics, data=data(units))
    return msgspec.structs.replace(log, **changed)


def receipt(*logs: Log, status: int = 1) -> Receipt:
    return Receipt(tx_hash=TX, block_number=100, block_hash=BLOCK_HASH, status=status, logs=logs)


def judged(*logs: Log, heads: Heads = FINAL, rules: ChainRules = RULES) -> Verdict:
    return verdict(receipt(*logs), BLOCK, rules, heads)


OTHER_EVENT = Log(address=TOKEN, topics=(WORD, topic(ALICE)), data="0x")
NFT = moved(ALICE, TREASURY, 5, address=BOB, topics=(TRANSFER_TOPIC, WORD, WORD, WORD), data="0x")


def test_each_transfer_to_the_treasury_is_its_own_credit_by_its_place_in_the_receipt():
    found = judged(
        OTHER_EVENT,
        moved(ALICE, TREASURY, 1),
        moved(ALICE, BOB, 2),
        NFT,
        moved(BOB, TREASURY, 3),
        moved(ALICE, TREASURY, 0),
        moved(ALICE, TREASURY, 1),
    )

    transfers = [finding.transfer for finding in found.findings]
    assert [(t.ordinal, t.sender, t.units) for t in transfers] == [
        (1, ALICE, 1),
        (4, BOB, 3),
        (6, ALICE, 1),
    ]
    assert (found.code, found.is_terminal) == (None, True)
    assert transfers[0] == Transfer(
        chain_id=8453,
        tx_hash=TX,
        ordinal=1,
        sender=ALICE,
        units=1,
        block_number=100,
        block_hash=BLOCK_HASH,
        block_time=BLOCK.time,
    )


@pytest.mark.parametrize(
    ("logs", "code"),
    [
        ((), Code.TOKEN_TRANSFER_NOT_FOUND),
        ((OTHER_EVENT, NFT), Code.TOKEN_TRANSFER_NOT_FOUND),
        ((moved(ALICE, TREASURY, 0),), Code.TOKEN_TRANSFER_NOT_FOUND),
        ((moved(ALICE, TREASURY, 5, address=BOB),), Code.TOKEN_TRANSFER_NOT_FOUND),
        ((moved(ALICE, BOB, 5), moved(ALICE, TREASURY, 0)), Code.RECIPIENT_MISMATCH),
        ((moved(TREASURY, BOB, 5),), Code.RECIPIENT_MISMATCH),
    ],
)
def test_without_a_transfer_to_the_treasury_the_reason_is_said(logs, code):
    found = judged(*logs)
    early = judged(*logs, heads=Heads(latest=101, safe=99))

    assert (found.code, found.is_terminal, found.findings) == (code, True, ())
    assert (early.code, early.is_terminal) == (code, False)


@pytest.mark.parametrize(
    "changed",
    [
        {"removed": True},
        {"topics": (TRANSFER_TOPIC, topic(ALICE))},
        {"topics": (TRANSFER_TOPIC,)},
        {"topics": (TRANSFER_TOPIC, topic(ALICE), topic(TREASURY), WORD)},
        {"topics": (TRANSFER_TOPIC, "0x01" + topic(ALICE)[4:], topic(TREASURY))},
        {"topics": (TRANSFER_TOPIC, topic(ALICE), "0x" + "0" * 23 + "1" + TREASURY[2:])},
        {"topics": (TRANSFER_TOPIC, topic(ALICE), topic(TREASURY) + "\n")},
        {"data": "0x"},
        {"data": data(5)[:-2]},
        {"data": data(5) + "00"},
        {"data": "0x" + "z" * 64},
        {"data": "0x" + "\u0661" * 64},
    ],
)
def test_what_the_token_cannot_have_written_is_asked_again(changed):
    found = judged(moved(BOB, TREASURY, 1), moved(ALICE, TREASURY, 5, **changed))

    assert found == Verdict(code=Code.RPC_ERROR)


def test_more_than_the_book_can_count_is_asked_again():
    most = (2**63 - 1) // 1000

    assert judged(moved(ALICE, TREASURY, most)).findings
    assert judged(moved(ALICE, TREASURY, most + 1)) == Verdict(code=Code.RPC_ERROR)
    assert judged(moved(ALICE, BOB, 2**255)).code is Code.RECIPIENT_MISMATCH


def test_mints_the_treasury_and_sweeps_pay_nobody():
    senders = (ALICE, ZERO_ADDRESS, TREASURY, SWEEP)
    found = judged(*(moved(sender, TREASURY, 1) for sender in senders))

    suspense = [finding.suspense for finding in found.findings]
    assert suspense == [None, Suspense.MINTED, Suspense.FROM_TREASURY, Suspense.FROM_SWEEP]


@pytest.mark.parametrize(
    "block",
    [
        None,
        msgspec.structs.replace(BLOCK, hash=WORD),
        msgspec.structs.replace(BLOCK, number=101),
    ],
)
def test_a_receipt_without_its_block_is_not_found(block):
    found = verdict(receipt(moved(ALICE, TREASURY, 1)), block, RULES, FINAL)

    assert found == Verdict(code=Code.TX_NOT_FOUND)
    assert verdict(None, None, RULES, FINAL) == found


def test_a_reverted_transaction_pays_nothing_even_with_logs():
    bad = receipt(moved(ALICE, TREASURY, 1), status=0)

    found = verdict(bad, BLOCK, RULES, FINAL)
    assert found == Verdict(code=Code.TX_REVERTED, is_terminal=True)
    assert not verdict(bad, BLOCK, RULES, Heads(latest=101)).is_terminal
    odd = msgspec.structs.replace(bad, status=2)
    assert verdict(odd, BLOCK, RULES, FINAL) == Verdict(code=Code.RPC_ERROR)


SMALL, LARGE = 1000 * UNITS_PER_USD, 1000 * UNITS_PER_USD + 1


@pytest.mark.parametrize(
    ("units", "heads", "is_final"),
    [
        (SMALL, Heads(latest=200, safe=100), True),
        (SMALL, Heads(latest=200, safe=99), False),
        (SMALL, Heads(latest=200, safe=99, finalized=100), True),
        (LARGE, Heads(latest=200, safe=150, finalized=99), False),
        (LARGE, Heads(latest=200, safe=150, finalized=100), True),
        (SMALL, Heads(latest=200), False),
        (SMALL, Heads(latest=100, safe=100, finalized=100), False),
        (SMALL, Heads(latest=100, safe=100, finalized=99), False),
        (SMALL, Heads(latest=99, safe=200, finalized=200), False),
    ],
)
def test_the_amount_says_how_deep_is_deep_enough(units, heads, is_final):
    found = judged(moved(ALICE, TREASURY, units), heads=heads)

    assert [finding.is_final for finding in found.findings] == [is_final]
    assert found.code is (None if is_final else Code.INSUFFICIENT_CONFIRMATIONS)
    assert found.is_terminal is is_final


def test_what_an_account_got_today_makes_the_next_one_wait():
    heads = Heads(latest=200, safe=150, finalized=50)
    day = 5000 * UNITS_PER_USD

    assert is_deep_enough(100, SMALL, RULES, heads, day - SMALL)
    assert not is_deep_enough(100, SMALL, RULES, heads, day - SMALL + 1)
    assert is_deep_enough(50, SMALL, RULES, heads, day)


def test_confirmations_include_the_block_itself():
    rules = msgspec.structs.replace(RULES, by_tags=False, confirmations=3)

    depths = [is_deep_enough(100, LARGE, rules, Heads(latest=n, safe=n)) for n in (101, 102)]
    assert depths == [False, True]


@pytest.mark.parametrize("text", ["0x" + "AB" * 32, "0X" + "ab" * 32, "0x" + "aB" * 32])
def test_a_hash_has_one_form_whatever_its_letters(text):
    assert read_hash(text) == "0x" + "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        *("", "0x", "ab" * 32, "0x" + "ab" * 31, "0x" + "ab" * 33, "0x" + "ag" * 32),
        *("0x" + "ab" * 32 + "\n", " 0x" + "ab" * 32),
        *("0x" + "\u212a" * 64, "0x" + "\uff11" * 64),
    ],
)
def test_what_is_no_hash_is_refused(text):
    with pytest.raises(HashMalformed):
        read_hash(text)


@given(st.text())
def test_a_hash_is_canonical_or_refused(text):
    try:
        found = read_hash(text)
    except HashMalformed:
        return
    assert read_hash(found) == found


def test_a_transfer_is_worth_exactly_its_units():
    transfer = judged(moved(ALICE, TREASURY, 12_345_678)).findings[0].transfer

    assert transfer_nanos(transfer) == 12_345_678_000
    made = BLOCK.time + timedelta(microseconds=999_999)
    assert not predates(transfer, made)  # a block has whole seconds
    assert predates(transfer, BLOCK.time + timedelta(seconds=1))


def test_the_rules_are_those_of_the_settings():
    chain = Chain(
        rpc_urls=Secret("http://a,http://b"),
        treasury="0x7e7e7e7E7e7E7e7e7e7E7e7e7e7E7e7e7e7e7e7E",
        sweep_addresses=("0x53535353535353535353535353535353535353AA",),
        safe_usd_max=7,
    )

    rules = chain_rules(chain)
    assert rules.token == "0x833589fcd6edb6e08f4c7c32d4f71b54bda02913"
    assert (rules.treasury, rules.safe_units_max) == (TREASURY, 7_000_000)
    assert rules.sweeps == {"0x53535353535353535353535353535353535353aa"}


# Receipts of which anything may be wrong; a good one now and then.
TOPICS = st.sampled_from([TRANSFER_TOPIC, topic(ALICE), topic(TREASURY), WORD, "0x", "", "0xzz"])
LOGS = st.builds(
    Log,
    address=st.sampled_from([TOKEN, BOB, "", "0x"]) | st.text(max_size=5),
    topics=st.lists(TOPICS | st.text(max_size=5), max_size=5).map(tuple)
    | st.just((TRANSFER_TOPIC, topic(ALICE), topic(TREASURY))),
    data=st.sampled_from([data(0), data(7), "0x", "", data(2**256 - 1), "0x-1"])
    | st.text(max_size=70),
    removed=st.booleans(),
)
NUMBERS = st.sampled_from([-1, 0, 99, 100, 101, 2**64])
RECEIPTS = st.builds(
    Receipt,
    tx_hash=st.just(TX),
    block_number=NUMBERS,
    block_hash=st.sampled_from([BLOCK_HASH, WORD, ""]),
    status=st.sampled_from([0, 1, 2, -1]),
    logs=st.lists(LOGS, max_size=4).map(tuple),
)
HEADS = st.builds(Heads, latest=NUMBERS, safe=NUMBERS | st.none(), finalized=NUMBERS | st.none())


@given(RECEIPTS, HEADS)
@example(receipt(moved(ALICE, TREASURY, 7)), FINAL)
def test_no_garbage_is_a_credit(found, heads):
    said = verdict(found, BLOCK, RULES, heads)

    if said.code is None or said.code is Code.INSUFFICIENT_CONFIRMATIONS:
        assert (found.status, found.block_number, found.block_hash) == (1, 100, BLOCK_HASH)
        assert said.findings
    else:
        assert said.findings == ()
    for finding in said.findings:
        log = found.logs[finding.transfer.ordinal]
        assert log == moved(ALICE, TREASURY, finding.transfer.units)
        assert finding.transfer.units > 0


RAW_LOG = {
    "address": TOKEN,
    "topics": [TRANSFER_TOPIC, topic(ALICE), topic(TREASURY)],
    "data": data(7),
    "blockHash": BLOCK_HASH,
    "blockNumber": "0x64",
    "transactionHash": TX,
    "logIndex": "0x5",
    "removed": False,
}
RAW = {
    "transactionHash": TX,
    "blockHash": BLOCK_HASH,
    "blockNumber": "0x64",
    "status": "0x1",
    "logs": [RAW_LOG, RAW_LOG | {"logIndex": "0x6"}],
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@given(st.sampled_from([*RAW, *(f"log.{name}" for name in RAW_LOG)]), ANYTHING)
@example("status", "0x1")
@example("log.data", "0x" + "f" * 64)
def test_a_receipt_with_one_odd_field_is_refused_or_the_same_credit(field, value):
    raw = msgspec.json.decode(msgspec.json.encode(RAW))
    (raw["logs"][0] if field.startswith("log.") else raw)[field.removeprefix("log.")] = value

    try:
        read = receipt_reader(TX)(msgspec.json.encode(raw))
    except BadAnswer:
        return
    said = verdict(read, BLOCK, RULES, FINAL)
    for finding in said.findings:
        assert finding.transfer.sender == ALICE
        assert finding.transfer.units == 7
