"""`farebox payments`, beside a book with payments in it."""

from pathlib import Path

import pytest

from billing import book
from billing.payments import credit_transfer
from config.ids import id_text
from tests.support.books import open_pool
from tests.support.cli import Cli
from tests.support.gateway import PEPPER
from tests.support.payments import new_address, payer, submitted, transfer_from
from tests.support.upstream.launch import Upstream


@pytest.fixture
def cli(tmp_path: Path, book_url: str, till_url: str, upstream: Upstream) -> Cli:
    where = {"DATABASE_URL": book_url, "TILL_URL": till_url, "KEYS__PEPPER": PEPPER}
    return Cli(tmp_path, upstream.base_url, **where)


async def test_payments_are_listed_and_shown(cli: Cli, book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account_id, wallet = await payer(pool)
        transfer, stray = transfer_from(wallet), transfer_from(new_address())
        attempt_id = await submitted(pool, account_id, transfer.tx_hash)
        async with book.acquire(pool) as conn:
            for each in (transfer, stray):
                await credit_transfer(conn, each)
    payment = f"pay_{id_text(attempt_id)}"

    (listed,) = await cli.json("payments", "list", "--account", f"acct_{id_text(account_id)}")
    (waiting,) = await cli.json("payments", "list", "--suspense")
    shown = await cli.json("payments", "show", payment)
    of_hash = await cli.json("payments", "show", stray.tx_hash.upper())

    assert (listed["payment_attempt_id"], listed["status"]) == (payment, "CREDITED")
    assert listed["credited_nanos"] == 5_000_000_000
    assert (waiting["tx_hash"], waiting["suspense_reason"]) == (stray.tx_hash, "unknown_sender")
    assert [row["state"] for row in shown["transfers"]] == ["credited"]
    assert shown["events"][0]["event"] == "INTENT_CREATED"
    assert [row["tx_hash"] for row in of_hash["transfers"]] == [stray.tx_hash]
