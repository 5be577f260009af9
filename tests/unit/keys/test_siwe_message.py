"""What is refused of a sign-in by looking at it, and that looking costs nothing."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from eth_utils.address import to_checksum_address

from config.address import checksum_address
from keys.errors import LoginRefused
from keys.siwe_message import Expected, check_message, read_message
from keys.siwe_signature import check_signature
from tests.support.siwe_cases import PARTS, SIGNATURES, TEXTS
from tests.support.wallets import KeyWallet, stamp, write_message

ORIGIN = "http://localhost:8080"
NONCE = {"nonce": "0123456789abcdef" * 2, "uri": ORIGIN, "domain": "localhost:8080"}
EXPECTED = Expected(origin=ORIGIN, chain_ids=(8453, 1))
WALLET = KeyWallet("0x" + "11" * 32)
WITHIN_S = 0.001


def look(text: str) -> None:
    check_message(read_message(text), EXPECTED, datetime.now(UTC))


def refused_within_s(judge: Callable[[], object]) -> float:
    """How long a refusal takes: the best of some, for others use the machine too."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        with pytest.raises(LoginRefused):
            judge()
        took.append(time.perf_counter() - began)
    return min(took)


@pytest.mark.parametrize("name", PARTS)
def test_a_message_that_says_something_else_is_refused_at_once(name: str) -> None:
    text = write_message(WALLET.address, NONCE, **PARTS[name](NONCE))

    assert refused_within_s(lambda: look(text)) < WITHIN_S


@pytest.mark.parametrize("name", TEXTS)
def test_a_message_in_other_bytes_is_refused_at_once(name: str) -> None:
    text = TEXTS[name](write_message(WALLET.address, NONCE))

    assert refused_within_s(lambda: look(text)) < WITHIN_S


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_of_another_shape_is_refused_at_once(name: str) -> None:
    signature = SIGNATURES[name](WALLET.sign("hello"))

    assert refused_within_s(lambda: check_signature(signature)) < WITHIN_S


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"statement": None},
        {"statement": "I accept: https://localhost/terms [v1.0] (yes)!"},
        {"uri": f"{ORIGIN}/login?next=/a#b"},
        {"domain": "http://localhost:8080"},
        {"chain_id": 1},
        {"issued_at": -290, "expiration_time": 200},
        {"expiration_time": 590, "not_before": -1},
        {"request_id": ""},
        {"request_id": "a-1", "resources": []},
        {"resources": ["ipfs://bafy/a", "https://example.com/claim.json"]},
    ],
    ids=str,
)
def test_a_message_as_wallets_write_it_passes(changes: dict[str, Any]) -> None:
    times = ("issued_at", "expiration_time", "not_before")
    moments = {name: stamp(changes[name]) for name in times if name in changes}

    look(write_message(WALLET.address, NONCE, **{**changes, **moments}))


def test_times_may_have_another_zone_and_more_digits() -> None:
    for issued_at in (datetime.now(UTC).isoformat(), stamp()[:-5] + ".123456789+00:00"):
        look(write_message(WALLET.address, NONCE, issued_at=issued_at))


@pytest.mark.parametrize("size", [65, 97, 96 * 32, 8192])
def test_a_signature_that_may_be_good_passes(size: int) -> None:
    signature = WALLET.sign("hello") if size == 65 else "0x" + "AB" * size

    assert check_signature(signature) == signature.lower()


def test_addresses_have_the_checksum_of_the_chain() -> None:
    for _ in range(20):
        address = KeyWallet().address
        assert checksum_address(address.lower()) == to_checksum_address(address) == address
