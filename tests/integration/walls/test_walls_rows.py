"""Row level security alone keeps tenants apart: here no statement asks for an account.

farebox_request is given every privilege first, so that nothing but the policies stands in the way.
"""
# ruff: noqa: S608 - the names of tables are our own

import asyncio
from uuid import UUID

import asyncpg
import pytest

from billing.book import Connection, acquire, as_tenant
from billing.roles import REQUEST, as_role
from keys.errors import KeysUnavailable
from keys.keys_store import list_all_keys, list_keys
from keys.store import KeyTerms, create_key
from tests.support.books import PEPPER, open_pool
from tests.support.walls import TENANT_TABLES, Pair, acting_for, refused

# How the rows of an account are told, by somebody who sees all.
KEYS_OF = "SELECT id FROM virtual_keys WHERE billing_account_id = $1"
USER_OF = "SELECT owner_user_id FROM billing_accounts WHERE id = $1"
BELONGS = dict.fromkeys(TENANT_TABLES, "billing_account_id = $1") | {
    "users": f"id = ({USER_OF})",
    "wallets": f"user_id = ({USER_OF})",
    "billing_accounts": "id = $1",
    "scope_spend": f"virtual_key_id IN ({KEYS_OF})",
    "idempotent_requests": f"virtual_key_id IN ({KEYS_OF})",
}
# An update of every row that changes nothing.
TOUCH = dict.fromkeys(TENANT_TABLES, "billing_account_id = billing_account_id") | {
    "users": "label = label",
    "wallets": "address = address",
    "billing_accounts": "balance_nanos = balance_nanos",
    "scope_spend": "spent_nanos = spent_nanos",
    "idempotent_requests": "request_id = request_id",
}
# By triggers, whoever asks.
GUARDED = (
    *("charge_receipts", "credit_ledger"),
    *("payment_intents", "payment_attempts", "payment_events", "chain_transfers"),
)


@pytest.fixture
async def pair(pair: Pair, admin: asyncpg.Connection) -> Pair:
    await admin.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {REQUEST}")
    # What is append-only would refuse before a policy could.
    for table in GUARDED:
        await admin.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    return pair


async def counts(admin: asyncpg.Connection, account_id: UUID) -> dict[str, int]:
    return {
        table: await admin.fetchval(f"SELECT count(*) FROM {table} WHERE {belongs}", account_id)
        for table, belongs in BELONGS.items()
    }


async def seen(tenant: Connection) -> dict[str, int]:
    return {
        table: await tenant.fetchval(f"SELECT count(*) FROM {table}") for table in TENANT_TABLES
    }


async def test_every_table_with_a_tenants_rows_is_behind_the_wall(
    admin: asyncpg.Connection,
) -> None:
    walled = await admin.fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        " AND relrowsecurity AND relforcerowsecurity"
    )
    leads_to_an_account = await admin.fetch(
        "SELECT DISTINCT table_name FROM information_schema.columns WHERE table_schema = 'public'"
        " AND column_name IN ('billing_account_id', 'virtual_key_id', 'user_id', 'owner_user_id')"
    )

    assert {row["relname"] for row in walled} == set(TENANT_TABLES)
    assert {row["table_name"] for row in leads_to_an_account} <= set(TENANT_TABLES)


async def test_a_tenant_sees_its_own_rows_and_no_others(
    pair: Pair, admin: asyncpg.Connection, tenant: asyncpg.Connection
) -> None:
    one, other = await counts(admin, pair.one.id), await counts(admin, pair.other.id)

    async with acting_for(tenant, pair.one.id):
        assert await seen(tenant) == one
    async with acting_for(tenant, pair.other.id):
        assert await seen(tenant) == other
    assert all(one[table] and other[table] for table in TENANT_TABLES)
    assert one != other


@pytest.mark.parametrize("account", [None, "", "00000000-0000-0000-0000-000000000000"])
async def test_nobody_in_particular_sees_nothing(
    pair: Pair, tenant: asyncpg.Connection, account: str | None
) -> None:
    if account is not None:
        await tenant.execute("SELECT set_config('farebox.account_id', $1, false)", account)

    assert await seen(tenant) == dict.fromkeys(TENANT_TABLES, 0)


async def test_an_account_that_is_no_id_is_an_error_and_not_a_way_in(
    pair: Pair, tenant: asyncpg.Connection
) -> None:
    await tenant.execute("SELECT set_config('farebox.account_id', 'x'' OR true', false)")

    for table in TENANT_TABLES:
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            await tenant.fetchval(f"SELECT count(*) FROM {table}")


async def test_a_tenant_changes_and_deletes_only_its_own_rows(
    pair: Pair, admin: asyncpg.Connection, tenant: asyncpg.Connection
) -> None:
    one = await counts(admin, pair.one.id)
    for table in TENANT_TABLES:
        async with acting_for(tenant, pair.one.id):
            updated = await tenant.execute(f"UPDATE {table} SET {TOUCH[table]}")
        assert (table, updated) == (table, f"UPDATE {one[table]}")
        async with acting_for(tenant, pair.one.id):
            # The foreign keys would hold too, but only at the end.
            await admin.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
            deleted = await tenant.execute(f"DELETE FROM {table}")
        assert (table, deleted) == (table, f"DELETE {one[table]}")


async def test_a_tenant_inserts_no_row_for_another(
    pair: Pair, admin: asyncpg.Connection, tenant: asyncpg.Connection
) -> None:
    for table, belongs in BELONGS.items():
        columns = await admin.fetchval(
            "SELECT string_agg(column_name, ', ') FROM information_schema.columns"
            " WHERE table_schema = 'public' AND table_name = $1 AND is_generated = 'NEVER'",
            table,
        )
        copy = (
            f"INSERT INTO {table} ({columns})"
            f" SELECT {columns} FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb)"
        )
        row = f"SELECT to_jsonb(t)::text FROM {table} AS t WHERE {belongs} LIMIT 1"
        theirs = await admin.fetchval(row, pair.other.id)
        own = await admin.fetchval(row, pair.one.id)

        async with acting_for(tenant, pair.one.id):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                await tenant.execute(copy, theirs)
        # The same of its own gets as far as the keys: it was the policy that refused.
        async with acting_for(tenant, pair.one.id):
            with pytest.raises(asyncpg.UniqueViolationError):
                await tenant.execute(copy, own)


async def test_a_tenant_gives_no_row_away_and_takes_none(
    pair: Pair, tenant: asyncpg.Connection
) -> None:
    for table, belongs in BELONGS.items():
        if belongs != "billing_account_id = $1":
            continue
        give = f"UPDATE {table} SET billing_account_id = '{pair.other.id}'"
        take = f"UPDATE {table} SET billing_account_id = '{pair.one.id}' WHERE {belongs}"
        async with acting_for(tenant, pair.one.id):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                await tenant.execute(give)
        async with acting_for(tenant, pair.one.id):
            assert await tenant.execute(take, pair.other.id) == "UPDATE 0"


async def test_joins_unions_and_functions_see_no_more(
    pair: Pair, admin: asyncpg.Connection, tenant: asyncpg.Connection
) -> None:
    await admin.execute(
        "CREATE FUNCTION all_digests() RETURNS SETOF bytea LANGUAGE sql STABLE"
        " AS 'SELECT digest FROM app_api_keys'"
    )
    queries = (
        "SELECT a.id FROM model_prices AS p FULL JOIN billing_accounts AS a ON true",
        "SELECT l.billing_account_id FROM charge_receipts AS r"
        " JOIN credit_ledger AS l ON l.reference = r.request_id::text",
        "SELECT billing_account_id FROM app_api_keys"
        " UNION ALL SELECT billing_account_id FROM virtual_keys",
        "WITH k AS (SELECT * FROM app_api_keys) SELECT billing_account_id FROM k",
        "SELECT (SELECT max(id::text)::uuid FROM billing_accounts)",
        "SELECT billing_account_id FROM app_api_keys WHERE digest IN (SELECT all_digests())",
    )
    for query in queries:
        async with acting_for(tenant, pair.one.id):
            rows = await tenant.fetch(query)
        assert {row[0] for row in rows} == {pair.one.id}, query
    async with acting_for(tenant, pair.one.id):
        assert len(await tenant.fetch("SELECT all_digests()")) == 1


async def test_row_security_cannot_be_switched_off(pair: Pair, tenant: asyncpg.Connection) -> None:
    for table in TENANT_TABLES:
        async with acting_for(tenant, pair.one.id):
            await tenant.execute("SET LOCAL row_security = off")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await tenant.fetch(f"SELECT 1 FROM {table}")
        assert await refused(tenant, f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
        assert await refused(tenant, f"DROP POLICY own_account ON {table}")


async def test_a_forgotten_account_in_our_own_code_shows_nobody_elses_keys(pair: Pair) -> None:
    async with open_pool(as_role(pair.url, REQUEST), 1) as pool:
        # What lists the keys of all accounts, for operators.
        async with as_tenant(pool, pair.one.id) as conn:
            own = await list_all_keys(conn, 100)
        async with as_tenant(pool, pair.one.id) as conn:
            theirs = await list_keys(conn, pair.other.id, 100)

    assert [key.id for key in own] == [pair.one.app_key_id]
    assert theirs == []


async def test_the_next_user_of_a_connection_is_not_the_last_tenant(pair: Pair) -> None:
    async with open_pool(as_role(pair.url, REQUEST), 1) as pool:
        async with as_tenant(pool, pair.one.id) as conn:
            await create_key(conn, pair.one.id, KeyTerms(name="new"), pepper=PEPPER)

        async def give_up() -> None:
            async with as_tenant(pool, pair.other.id) as conn:
                await create_key(conn, pair.other.id, KeyTerms(name="never"), pepper=PEPPER)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await give_up()
        async with acquire(pool) as conn:
            assert await seen(conn) == dict.fromkeys(TENANT_TABLES, 0)
        async with as_tenant(pool, pair.one.id) as conn:
            assert [key.name for key in await list_all_keys(conn, 9)] == ["new", "test"]
        async with as_tenant(pool, pair.other.id) as conn:
            assert [key.name for key in await list_all_keys(conn, 9)] == ["test"]


async def test_tenants_at_the_same_time_stay_apart(pair: Pair) -> None:
    async with open_pool(as_role(pair.url, REQUEST), 2) as pool:

        async def balances(account_id: UUID) -> None:
            async with as_tenant(pool, account_id) as conn:
                rows = await conn.fetch("SELECT id FROM billing_accounts")
                await conn.execute("SELECT pg_sleep(0.001)")
                again = await conn.fetch("SELECT billing_account_id FROM credit_ledger")
            assert {row[0] for row in (*rows, *again)} == {account_id}

        await asyncio.gather(*(balances(a.id) for a in (pair.one, pair.other) * 30))


async def test_a_key_of_another_account_cannot_be_made(pair: Pair) -> None:
    async with open_pool(as_role(pair.url, REQUEST), 1) as pool, open_pool(pair.url, 1) as all_:

        async def steal() -> None:
            async with as_tenant(pool, pair.one.id) as conn:
                await create_key(conn, pair.other.id, KeyTerms(name="stolen"), pepper=PEPPER)

        with pytest.raises(KeysUnavailable) as caught:
            await steal()
        assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)
        assert await all_.fetchval("SELECT count(*) FROM app_api_keys") == 2
