"""The system tenant: the account that Farebox's own jobs spend from, capped like anybody's.

There is one. Its flag only says which account that is: nobody is allowed or refused anything for
it, and it is stopped like others, by freezing it.
Failure: BookUnavailable.
"""

from uuid import UUID

import msgspec

from billing.book import Connection, create_account, grant, read_account, translated
from billing.till_epoch import AccountState

LABEL = "system"
# The first credits are granted once, whatever amount is asked for later.
REFERENCE = "system_tenant_first_credits"


class Caps(msgspec.Struct, frozen=True, kw_only=True):
    """What the system tenant may do at most; None stays as it is, or becomes FIRST_CAPS."""

    budget_nanos: int | None = None
    """A day, on its default virtual key."""
    open_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


FIRST_CAPS = Caps(
    budget_nanos=10_000_000_000,
    open_requests=20,
    requests_per_minute=600,
    tokens_per_minute=1_000_000,
)
FIRST_CREDITS_NANOS = 100_000_000_000


class SystemTenant(msgspec.Struct, frozen=True, kw_only=True):
    """The account as it stands."""

    state: AccountState
    caps: Caps
    is_new: bool


# Two at once would make two accounts, of which one could not be the system tenant.
LOCK_SYSTEM_TENANT = "SELECT pg_advisory_xact_lock(hashtextextended('the system tenant', 0))"
SELECT_SYSTEM_TENANT = """
SELECT id
FROM billing_accounts
WHERE is_system_tenant
"""
MARK_SYSTEM_TENANT = """
UPDATE billing_accounts
SET is_system_tenant = true
WHERE id = $1
"""
SET_CAPS = """
UPDATE billing_accounts
SET open_requests_max = coalesce($2, open_requests_max),
    requests_per_minute = coalesce($3, requests_per_minute),
    tokens_per_minute = coalesce($4, tokens_per_minute)
WHERE id = $1
"""
SET_DEFAULT_BUDGET = """
UPDATE virtual_keys
SET budget_nanos = $2, budget_window = 'day'
WHERE billing_account_id = $1 AND is_default AND $2::bigint IS NOT NULL
"""
SELECT_CAPS = """
SELECT v.budget_nanos, a.open_requests_max AS open_requests, a.requests_per_minute,
    a.tokens_per_minute
FROM billing_accounts AS a
JOIN virtual_keys AS v ON v.billing_account_id = a.id AND v.is_default
WHERE a.id = $1
"""


async def ensure_system_tenant(
    conn: Connection, caps: Caps, credits_nanos: int = FIRST_CREDITS_NANOS
) -> SystemTenant:
    """The system tenant, made with caps and credits if there is none. Safe to repeat.

    What is named of the caps changes an existing one; credits are given to a new one only. Raises
    CreditTooLarge.
    """
    async with translated(), conn.transaction():
        await conn.execute(LOCK_SYSTEM_TENANT)
        account_id: UUID | None = await conn.fetchval(SELECT_SYSTEM_TENANT)
        is_new = account_id is None
        if account_id is None:
            account_id = await create_account(conn, LABEL)
            await conn.execute(MARK_SYSTEM_TENANT, account_id)
            await _set_caps(conn, account_id, FIRST_CAPS)
            await grant(conn, account_id, credits_nanos, REFERENCE, "the system tenant's first")
        await _set_caps(conn, account_id, caps)
        row = await conn.fetchrow(SELECT_CAPS, account_id)
        assert row is not None  # every account has a default virtual key
        state = await read_account(conn, account_id)
    return SystemTenant(state=state, caps=Caps(**dict(row)), is_new=is_new)


async def _set_caps(conn: Connection, account_id: UUID, caps: Caps) -> None:
    budget_nanos, *limits = msgspec.structs.astuple(caps)
    await conn.execute(SET_CAPS, account_id, *limits)
    await conn.execute(SET_DEFAULT_BUDGET, account_id, budget_nanos)
