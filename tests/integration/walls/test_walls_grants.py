"""What each role may do, exactly; and that all of our SQL can do with that."""

from collections import defaultdict
from collections.abc import AsyncIterator

import asyncpg
import pytest

from billing.roles import APPEND_ONLY, REQUEST, WORKER, as_role
from tests.integration.test_sql import FOUND, UTILITY
from tests.support.walls import Pair, acting_for, refused

READ = frozenset({"SELECT"})
ADD = frozenset({"SELECT", "INSERT"})
KEEP = ADD | {"DELETE"}
# Of some columns only.
KEY_COLUMNS = frozenset(
    f"UPDATE {column}"
    for column in (
        *("name", "prefix", "last4", "digest", "pepper_version", "status", "expires_at"),
        *("revoked_at", "open_requests_max", "requests_per_minute", "tokens_per_minute"),
        *("models", "ip_allow", "scopes", "previous_digest", "previous_expires_at"),
        *("rotated_at", "rotation_digest"),
    )
)
ACCOUNT_COLUMNS = frozenset(
    f"UPDATE {column}"
    for column in (
        *("balance_nanos", "version", "status", "status_reason", "status_changed_at"),
        *("open_requests_max", "requests_per_minute", "tokens_per_minute", "is_system_tenant"),
    )
)
BUDGET_COLUMNS = frozenset({"UPDATE budget_nanos", "UPDATE budget_window"})
SEALED_COLUMNS = frozenset({"UPDATE sealed", "UPDATE created_at"})
ATTEMPT_COLUMNS = frozenset(
    f"UPDATE {column}" for column in ("status", "error_code", "tx_hash", "submitted_at", "ended_at")
)
TRANSFER_COLUMNS = frozenset(
    f"UPDATE {column}"
    for column in (
        *("sender", "units", "nanos", "block_number", "block_hash", "block_time", "state"),
        *("suspense_reason", "billing_account_id", "payment_attempt_id", "generation"),
        "changed_at",
    )
)
EXPECTED = {
    WORKER: {
        "users": ADD,
        "wallets": ADD | {"UPDATE kind", "UPDATE proved_at"},
        "billing_accounts": ADD | ACCOUNT_COLUMNS,
        "virtual_keys": ADD | BUDGET_COLUMNS,
        "app_api_keys": ADD | KEY_COLUMNS,
        "operator_keys": ADD | {"UPDATE expires_at", "UPDATE revoked_at"},
        "model_prices": ADD,
        "charge_receipts": ADD,
        "credit_ledger": ADD,
        "scope_spend": ADD | {"UPDATE spent_nanos", "UPDATE version"},
        "till_epoch": READ | {"UPDATE epoch", "UPDATE server_run_id", "UPDATE changed_at"},
        "idempotent_requests": KEEP | {"UPDATE request_id", "UPDATE created_at"},
        "workers": KEEP | {"UPDATE seen_at"},
        "upstream_credentials": KEEP | SEALED_COLUMNS,
        "schema_migrations": READ,
        "payment_intents": ADD,
        "payment_attempts": ADD | ATTEMPT_COLUMNS | {"UPDATE checked_at", "UPDATE checked_code"},
        "payment_events": ADD,
        "chain_transfers": ADD | TRANSFER_COLUMNS,
        "chain_cursors": ADD | {"UPDATE block_number", "UPDATE updated_at"},
    },
    REQUEST: {
        "users": READ,
        "wallets": READ,
        "billing_accounts": READ,
        "virtual_keys": ADD | BUDGET_COLUMNS,
        "app_api_keys": ADD | KEY_COLUMNS,
        "charge_receipts": READ,
        "credit_ledger": READ,
        "scope_spend": READ,
        "model_prices": READ,
        "payment_intents": ADD,
        "payment_attempts": ADD | ATTEMPT_COLUMNS,
        "payment_events": ADD,
        "chain_transfers": READ,
        # Without what is sealed.
        "upstream_credentials": SEALED_COLUMNS
        | {"INSERT", "DELETE"}
        | {f"SELECT {name}" for name in ("virtual_key_id", "billing_account_id", "provider")}
        | {"SELECT created_at"},
    },
}
SELECT_GRANTS = """
SELECT grantee::regrole::text AS role, relname, privilege_type AS what
FROM pg_class, aclexplode(relacl)
WHERE relnamespace = 'public'::regnamespace AND grantee <> relowner AND grantee <> 0
UNION ALL
SELECT grantee::regrole::text, relname, privilege_type || ' ' || attname
FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid, aclexplode(attacl)
WHERE relnamespace = 'public'::regnamespace
UNION ALL
SELECT 'everybody', relname, privilege_type
FROM pg_class, aclexplode(relacl)
WHERE relnamespace = 'public'::regnamespace AND grantee = 0
"""
SELECT_COLUMNS = """
SELECT attname
FROM pg_attribute
WHERE attrelid = $1::text::regclass AND attnum > 0 AND attgenerated = '' AND attidentity = ''
"""
# What the tenants' own routes run, besides what they share with operators.
OF_TENANTS = (
    "billing.book.ACT_FOR",
    "billing.book.SELECT_ACCOUNT",
    "billing.history.",
    "billing.payment_attempts.INSERT_",
    "billing.payment_attempts.LOCK_ATTEMPT",
    "billing.payment_attempts.SELECT_",
    "billing.payment_attempts.SUBMIT",
    "billing.payment_attempts.END_ATTEMPT",
    "billing.payments_store.INSERT_ATTEMPT_EVENT",
    "billing.spend.",
    "keys.keys_store.",
    "keys.store.INSERT_KEY",
    "keys.store.INSERT_VIRTUAL_KEY",
)
# What is run by whoever owns the tables, or on another database.
OF_OWNERS = ("migrations.", "gateway.embedded.")


@pytest.fixture
async def worker(book_url: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(as_role(book_url, WORKER))
    yield conn
    await conn.close()


async def test_the_privileges_are_these_and_no_others(admin: asyncpg.Connection) -> None:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in await admin.fetch(SELECT_GRANTS):
        found[row["role"]][row["relname"]].add(row["what"])

    assert {role: dict(tables) for role, tables in found.items()} == EXPECTED


async def test_no_role_of_ours_is_more_than_a_group(admin: asyncpg.Connection) -> None:
    rows = await admin.fetch(
        "SELECT rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls"
        " FROM pg_roles WHERE rolname = ANY($1::text[])",
        [REQUEST, WORKER],
    )

    assert [set(row.values()) for row in rows] == [{False}, {False}]


async def runs(conn: asyncpg.Connection, text: str) -> str:
    """Why the statement cannot be run here; privileges are only looked at when it is begun."""
    plain = text.strip().rstrip(";")
    try:
        async with conn.transaction():
            if plain.startswith(UTILITY):
                await conn.execute(plain)
            else:
                await conn.execute(f"EXPLAIN (GENERIC_PLAN) {plain}")
    except asyncpg.PostgresError as exc:
        return str(exc)
    return ""


async def test_all_of_our_sql_runs_as_the_role_it_is_for(
    worker: asyncpg.Connection, tenant: asyncpg.Connection
) -> None:
    serving = [(name, text) for name, text in FOUND if not name.startswith(OF_OWNERS)]
    of_tenants = [(name, text) for name, text in serving if name.startswith(OF_TENANTS)]

    wrong = [f"{name}: {why}" for name, text in serving if (why := await runs(worker, text))]
    wrong += [f"{name}: {why}" for name, text in of_tenants if (why := await runs(tenant, text))]

    assert not wrong, "\n".join(wrong)
    assert len(of_tenants) >= len(OF_TENANTS)


async def test_it_would_be_found_when_a_role_may_not_run_a_statement(
    worker: asyncpg.Connection, tenant: asyncpg.Connection
) -> None:
    by_name = dict(FOUND)

    assert "permission denied" in await runs(tenant, by_name["billing.posting.POST_RECEIPTS"])
    assert "permission denied" in await runs(tenant, by_name["billing.book.UPDATE_BALANCE"])
    assert "permission denied" in await runs(tenant, by_name["keys.store.SELECT_OPERATOR"])
    assert "permission denied" in await runs(worker, by_name["migrations.runner.INSERT_HISTORY"])


async def test_the_worker_cannot_change_what_is_append_only(
    pair: Pair, worker: asyncpg.Connection
) -> None:
    assert await worker.fetchval("SELECT count(*) FROM charge_receipts") == 3
    for table in APPEND_ONLY:
        for statement in (
            f"DELETE FROM {table}",  # noqa: S608 - our own names
            f"TRUNCATE {table}",
            f"ALTER TABLE {table} DISABLE TRIGGER ALL",
            f"DROP TABLE {table}",
            f"DROP TRIGGER {table}_append_only ON {table}",
        ):
            assert await refused(worker, statement), statement
        for row in await worker.fetch(SELECT_COLUMNS, table):
            update = f"UPDATE {table} SET {row['attname']} = {row['attname']}"  # noqa: S608
            assert await refused(worker, update), update


@pytest.mark.parametrize("role", [REQUEST, WORKER])
async def test_neither_role_makes_or_changes_anything_but_rows(book_url: str, role: str) -> None:
    conn = await asyncpg.connect(as_role(book_url, role))
    for statement in (
        "CREATE TABLE mine (id integer)",
        "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "CREATE OR REPLACE FUNCTION request_account() RETURNS uuid LANGUAGE sql AS 'SELECT NULL'",
        "ALTER TABLE billing_accounts ADD COLUMN more text",
        "ALTER TABLE billing_accounts NO FORCE ROW LEVEL SECURITY",
        "CREATE POLICY mine ON billing_accounts USING (true)",
        "DROP FUNCTION request_account()",
        "CREATE ROLE mine",
        "UPDATE billing_accounts SET owner_user_id = owner_user_id",
        "UPDATE app_api_keys SET billing_account_id = billing_account_id",
        "DELETE FROM app_api_keys",
        "DELETE FROM schema_migrations",
    ):
        assert await refused(conn, statement), statement
    await conn.close()


async def test_a_tenant_reaches_no_table_that_is_not_of_tenants(
    tenant: asyncpg.Connection,
) -> None:
    for table in (
        *("operator_keys", "till_epoch", "workers", "schema_migrations"),
        *("idempotent_requests", "chain_cursors"),
    ):
        assert await refused(tenant, f"SELECT 1 FROM {table}"), table  # noqa: S608 - ours
    assert not await refused(tenant, "SELECT model FROM model_prices")
    assert await refused(tenant, "INSERT INTO model_prices (model) VALUES ('m')")


async def test_a_tenant_can_neither_pay_itself_nor_read_what_is_sealed(
    pair: Pair, tenant: asyncpg.Connection
) -> None:
    async with acting_for(tenant, pair.one.id):
        shown = await tenant.fetch("SELECT provider FROM upstream_credentials")
    assert [row["provider"] for row in shown] == ["provider 0"]
    assert await refused(tenant, "SELECT sealed FROM upstream_credentials")
    assert await refused(tenant, "UPDATE billing_accounts SET balance_nanos = balance_nanos")
    assert await refused(tenant, "UPDATE scope_spend SET spent_nanos = 0")
    assert await refused(tenant, "INSERT INTO credit_ledger (seq) VALUES (1)")
    assert await refused(tenant, "INSERT INTO chain_transfers (ordinal) VALUES (1)")
    assert await refused(tenant, "UPDATE chain_transfers SET state = 'credited'")
