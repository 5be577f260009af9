"""Users and their wallets in Postgres: an address belongs to one user, whoever comes first.

Signing in looks up who somebody is, so these queries are the ones that name no account.
Failure: KeysUnavailable when Postgres does not answer in time.
"""

from typing import Any, Literal
from uuid import UUID

import msgspec

from config.ids import new_id
from keys.errors import WalletTaken
from keys.principal import Limits, Principal
from keys.store import ACQUIRE_TIMEOUT_S, Connection, Pool, translated

WalletKind = Literal["eoa", "contract"]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A user with what belongs to them from the first sign-in on."""

    user_id: UUID
    account_id: UUID
    virtual_key_id: UUID


class Wallet(msgspec.Struct, frozen=True, kw_only=True):
    """A wallet that was proved to be its user's."""

    address: str
    kind: WalletKind


class _Lost(Exception):
    """Somebody else was first: nothing of this transaction may stay."""


FIND_IDENTITY = """
SELECT w.user_id, a.id AS account_id, v.id AS virtual_key_id
FROM wallets AS w
JOIN billing_accounts AS a ON a.owner_user_id = w.user_id
JOIN virtual_keys AS v ON v.billing_account_id = a.id AND v.is_default
WHERE lower(w.address) = lower($1)
"""


async def find_identity(conn: Connection, address: str) -> Identity | None:
    """Whose wallet an address is; nobody's when nobody signed in with it."""
    row = await conn.fetchrow(FIND_IDENTITY, address)
    return None if row is None else Identity(**dict(row))


INSERT_WALLET = """
INSERT INTO wallets (address, user_id, kind)
VALUES ($1, $2, $3)
ON CONFLICT DO NOTHING
RETURNING user_id
"""
INSERT_USER = "INSERT INTO users (id) VALUES ($1)"
INSERT_ACCOUNT = "INSERT INTO billing_accounts (id, owner_user_id) VALUES ($1, $2)"
INSERT_DEFAULT_KEY = """
INSERT INTO virtual_keys (id, billing_account_id, is_default)
VALUES ($1, $2, true)
"""
NOTE_PROOF = """
UPDATE wallets
SET kind = $2, proved_at = now()
WHERE lower(address) = lower($1)
"""


async def sign_in(pool: Pool, wallet: Wallet) -> tuple[Identity, bool]:
    """The user of a proved wallet, made at its first sign-in, and whether that was now.

    However many sign in at once, one user, account and default virtual key come of it.
    """
    async with translated(), pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
        known = await find_identity(conn, wallet.address)
        if known is not None:
            # A wallet may become a contract (EIP-7702), and its sessions then are shorter.
            await conn.execute(NOTE_PROOF, wallet.address, wallet.kind)
            return known, False
        try:
            async with conn.transaction():
                return await _create(conn, wallet), True
        except _Lost:
            known = await find_identity(conn, wallet.address)
            assert known is not None
            return known, False


async def _create(conn: Connection, wallet: Wallet) -> Identity:
    """In the caller's transaction. Raises _Lost, after waiting for whoever was first."""
    made = Identity(user_id=new_id(), account_id=new_id(), virtual_key_id=new_id())
    await conn.execute(INSERT_USER, made.user_id)
    won = await conn.fetchval(INSERT_WALLET, wallet.address, made.user_id, wallet.kind)
    if won is None:
        raise _Lost
    await conn.execute(INSERT_ACCOUNT, made.account_id, made.user_id)
    await conn.execute(INSERT_DEFAULT_KEY, made.virtual_key_id, made.account_id)
    return made


async def link_wallet(pool: Pool, user_id: UUID, wallet: Wallet) -> None:
    """Give a proved wallet to a user; again changes nothing. Raises WalletTaken."""
    async with translated(), pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
        won = await conn.fetchval(INSERT_WALLET, wallet.address, user_id, wallet.kind)
        if won is None:
            owner = await find_identity(conn, wallet.address)
            if owner is None or owner.user_id != user_id:
                raise WalletTaken


LIST_WALLETS = """
SELECT address, kind
FROM wallets
WHERE user_id = $1
ORDER BY created_at, address
LIMIT 100
"""


async def list_wallets(conn: Connection, user_id: UUID) -> list[Wallet]:
    """The wallets of a user, oldest first."""
    async with translated():
        rows = await conn.fetch(LIST_WALLETS, user_id)
    return [Wallet(address=row["address"], kind=row["kind"]) for row in rows]


SELECT_SESSION_PRINCIPAL = """
SELECT
    a.id, v.id AS virtual_key_id, a.status = 'active' AS account_active, a.open_requests_max,
    a.requests_per_minute, a.tokens_per_minute,
    ARRAY(
        SELECT (u.provider, u.sealed) FROM upstream_credentials AS u
        WHERE u.virtual_key_id = v.id
    ) AS upstream_keys
FROM billing_accounts AS a
JOIN virtual_keys AS v ON v.billing_account_id = a.id AND v.is_default
WHERE a.id = $1 AND a.owner_user_id = $2
"""


async def session_principal(
    pool: Pool, account_id: UUID, user_id: UUID, digest: bytes
) -> Principal | None:
    """The principal of a session: it spends from the account's default virtual key."""
    async with translated(), pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
        row = await conn.fetchrow(SELECT_SESSION_PRINCIPAL, account_id, user_id)
    return None if row is None else _principal(row, digest)


def _principal(row: Any, digest: bytes) -> Principal:
    return Principal(
        account_id=row["id"],
        virtual_key_id=row["virtual_key_id"],
        app_key_id=None,
        digest=digest,
        expires_at=None,
        account_active=row["account_active"],
        account_limits=Limits(
            open_requests=row["open_requests_max"],
            requests_per_minute=row["requests_per_minute"],
            tokens_per_minute=row["tokens_per_minute"],
        ),
        upstream_keys=tuple((provider, sealed) for provider, sealed in row["upstream_keys"]),
    )
