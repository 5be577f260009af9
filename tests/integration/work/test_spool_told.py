"""A worker that begins brings dead workers' spools into the book, and tells the till of it."""

import os
from pathlib import Path

import pytest

from billing.errors import InsufficientCredit, KeyLimitReached
from billing.receipts import encode_receipt
from billing.spool import spool_line
from config.ids import id_text, new_id
from tests.support.books import make_account
from tests.support.gateway import eventually, make_settings, running_gateway
from tests.support.upstream.launch import Upstream

CREDIT, SPENT, LIMIT = 1000, 700, 800


async def test_a_till_that_lost_the_holds_is_told_what_was_spent(
    book_url: str, till_url: str, upstream: Upstream, tmp_path: Path
) -> None:
    """Else it would let the same credit, and the same budget, be spent again."""
    settings = make_settings(upstream.base_url)
    spooling = make_settings(upstream.base_url, book__spool_dir=str(tmp_path))
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as one:
        account = await make_account(one.pool, CREDIT, limit=LIMIT)
        till = one.services.till
        await till.seed_all(account.scopes)
        line = spool_line(encode_receipt(account.receipt(SPENT)))
        (tmp_path / "w_dead-1.spool").write_bytes(line)
        async with running_gateway(book_url, till_url, upstream.base_url, spooling):

            async def replayed() -> bool | None:
                return None if "w_dead-1.spool" in os.listdir(tmp_path) else True

            await eventually(replayed)
            with pytest.raises(KeyLimitReached) as of_key:
                await till.admit(account.scopes, id_text(new_id()), CREDIT - SPENT, b"{}")
            with pytest.raises(InsufficientCredit) as of_account:
                await till.admit(account.scopes, id_text(new_id()), CREDIT - SPENT + 1, b"{}")

    assert of_key.value.available_nanos == LIMIT - SPENT
    assert of_account.value.available_nanos == CREDIT - SPENT
