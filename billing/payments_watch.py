"""What whoever looks at the chain asks the book: how far it was read, what may still change.

Failure: BookUnavailable.
"""

from datetime import timedelta

from billing.book import Connection, translated
from billing.chain.transfer import Transfer
from billing.payments_store import transfer_of

SELECT_CURSOR = """
SELECT block_number
FROM chain_cursors
WHERE chain_id = $1 AND token = $2 AND treasury = $3
"""


async def read_cursor(conn: Connection, chain_id: int, token: str, treasury: str) -> int | None:
    """The last block that was searched for transfers to a treasury; None: none was."""
    async with translated():
        found = await conn.fetchval(SELECT_CURSOR, chain_id, token, treasury)
    assert found is None or isinstance(found, int)
    return found


ADVANCE_CURSOR = """
INSERT INTO chain_cursors (chain_id, token, treasury, block_number)
VALUES ($1, $2, $3, $4)
ON CONFLICT (chain_id, token, treasury) DO UPDATE
SET block_number = greatest(chain_cursors.block_number, excluded.block_number), updated_at = now()
"""


async def advance_cursor(
    conn: Connection, chain_id: int, token: str, treasury: str, block_number: int
) -> None:
    """Note that everything up to a block is in the book. Never goes back."""
    async with translated():
        await conn.execute(ADVANCE_CURSOR, chain_id, token, treasury, block_number)


SELECT_ABOVE = """
SELECT chain_id, tx_hash, ordinal, sender, units, block_number, block_hash, block_time
FROM chain_transfers
WHERE chain_id = $1 AND block_number > $2 AND state IN ('seen', 'credited')
ORDER BY block_number, tx_hash, ordinal
LIMIT $3
"""


async def transfers_above(
    conn: Connection, chain_id: int, block_number: int, limit: int
) -> list[Transfer]:
    """Transfers that a reorg may still take away: above the finalized block, oldest first."""
    async with translated():
        rows = await conn.fetch(SELECT_ABOVE, chain_id, block_number, limit)
    return [transfer_of(row) for row in rows]


SELECT_CREDITED_UNITS = """
SELECT coalesce(sum(t.units), 0)::bigint
FROM wallets AS w
JOIN billing_accounts AS a ON a.owner_user_id = w.user_id
JOIN chain_transfers AS t ON t.billing_account_id = a.id
WHERE lower(w.address) = $1 AND t.state = 'credited' AND t.changed_at > now() - $2::interval
"""


async def credited_units(conn: Connection, sender: str, within: timedelta) -> int:
    """What the account of a wallet was credited lately: the limit of a day below finality."""
    async with translated():
        found = await conn.fetchval(SELECT_CREDITED_UNITS, sender, within)
    assert isinstance(found, int)
    return found
