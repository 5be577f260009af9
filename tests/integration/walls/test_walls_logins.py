"""Logins as operators make them: which of them may serve, and what they cannot get out of."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from billing.roles import (
    REQUEST,
    WORKER,
    as_role,
    look_at,
    wrong_request,
    wrong_shared,
    wrong_worker,
)
from config.errors import ConfigError
from config.secret import Secret
from config.settings import Book
from gateway.cli.walls import check_roles
from migrations.runner import Migration, MigrationError, migrate, read_migrations
from tests.conftest import database_url
from tests.support.walls import Pair, acting_for, login_url, refused

MIGHTY_LOGINS = {
    "login_super": ["login_super is a superuser"],
    "login_hidden": ["login_hidden may become a superuser (login_super)"],
    "login_bypass": ["login_bypass bypasses row level security (as login_bypass)"],
    "login_roles": ["login_roles may create roles (as login_roles)"],
    "login_copies": ["login_copies may copy the whole cluster (as login_copies)"],
    "login_stranger": [
        "login_stranger is no member of farebox_{} (GRANT farebox_{} TO login_stranger)"
    ],
    "login_mighty": [
        "login_mighty can get at every row (as pg_write_all_data)",
        "login_mighty may change what is append-only"
        " (charge_receipts, credit_ledger, model_prices, payment_events, payment_intents)",
    ],
}


@pytest.fixture
async def own_url(postgres_url: str, logins: str) -> AsyncIterator[str]:
    """An empty database that belongs to login_owner, as that login."""
    admin = await asyncpg.connect(postgres_url)
    await admin.execute("CREATE DATABASE owned OWNER login_owner")
    yield login_url(database_url(postgres_url, "owned"), "login_owner")
    await admin.execute("DROP DATABASE owned WITH (FORCE)")
    await admin.close()


@pytest.mark.parametrize("login", ["login_request", "login_worker"])
async def test_a_login_cannot_become_anybody_else(pair: Pair, logins: str, login: str) -> None:
    conn = await asyncpg.connect(login_url(logins, login))
    other = {"login_request": WORKER, "login_worker": REQUEST}[login]
    for statement in (
        f"SET ROLE {other}",
        "SET ROLE login_owner",
        "SET ROLE pg_read_all_data",
        "SET SESSION AUTHORIZATION login_owner",
        f"GRANT {other} TO {login}",
        f"ALTER ROLE {login} BYPASSRLS",
        "CREATE TABLE mine (id integer)",
    ):
        assert await refused(conn, statement), statement
    await conn.execute("RESET ROLE")
    own = await conn.fetchval("SELECT count(*) FROM app_api_keys")
    await conn.close()

    assert own == {"login_request": 0, "login_worker": 2}[login]


async def test_a_login_sees_the_keys_and_digests_of_its_account_only(
    pair: Pair, logins: str
) -> None:
    conn = await asyncpg.connect(login_url(logins, "login_request"))
    async with acting_for(conn, pair.one.id):
        seen = await conn.fetch("SELECT billing_account_id, digest FROM app_api_keys")
    await conn.close()

    assert [row["billing_account_id"] for row in seen] == [pair.one.id]


async def test_the_two_logins_of_a_well_run_book_are_accepted(logins: str) -> None:
    await check_roles(separate(logins, "login_worker", "login_request"))
    await check_roles(separate(logins, "login_worker", ""), serves=False)


async def test_a_login_that_could_get_past_a_wall_is_refused(logins: str) -> None:
    good = await look_at(worker(logins))
    for login, wrong in MIGHTY_LOGINS.items():
        found = await look_at(login_url(logins, login))
        for role, said in (
            ("worker", wrong_worker(found)),
            ("request", wrong_request(found, good)),
        ):
            assert {text.format(role, role) for text in wrong} <= set(said), (login, role)


async def test_a_request_login_that_reads_secrets_is_refused(logins: str) -> None:
    good, found = await look_at(worker(logins)), await look_at(login_url(logins, "login_reads"))

    assert wrong_request(found, good)[0] == (
        "login_reads may read operators' keys or sealed credentials (as pg_read_all_data)"
    )


async def test_a_request_login_that_is_the_worker_too_is_refused(logins: str) -> None:
    good, both = await look_at(worker(logins)), await look_at(login_url(logins, "login_both"))

    assert wrong_request(good, good) == [
        "login_worker is the login of book.url too: give it one of its own",
        "login_worker is no member of farebox_request (GRANT farebox_request TO login_worker)",
    ]
    assert wrong_request(both, good) == [
        "login_both is a member of farebox_worker, which sees every account"
    ]
    assert wrong_worker(good) == wrong_worker(both) == []


async def test_a_request_url_of_another_database_is_refused(logins: str, template_url: str) -> None:
    elsewhere = login_url(database_url(template_url, "farebox_template"), "login_request")
    found = await look_at(elsewhere)

    assert wrong_request(found, await look_at(worker(logins))) == [
        "leads to another database than book.url"
    ]


async def test_walls_that_somebody_took_down_are_seen(
    logins: str, admin: asyncpg.Connection
) -> None:
    await admin.execute("ALTER TABLE app_api_keys DISABLE ROW LEVEL SECURITY")
    await admin.execute("ALTER TABLE credit_ledger NO FORCE ROW LEVEL SECURITY")
    await admin.execute(f"GRANT UPDATE (amount_nanos) ON credit_ledger TO {WORKER}")
    await admin.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")

    assert wrong_worker(await look_at(worker(logins))) == [
        "login_worker may change what is append-only (credit_ledger)",
        "login_worker may create tables (REVOKE CREATE ON SCHEMA ... FROM PUBLIC)",
        "row level security is not forced on app_api_keys, credit_ledger",
    ]


async def test_everything_wrong_is_named_at_once(logins: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await check_roles(separate(logins, "login_super", "login_bypass"))

    assert caught.value.problems == (
        "FAREBOX_DATABASE_URL: login_super is a superuser",
        "FAREBOX_BOOK__REQUEST_URL: login_bypass bypasses row level security (as login_bypass)",
        "FAREBOX_BOOK__REQUEST_URL: login_bypass is a member of farebox_worker,"
        " which sees every account",
    )


async def test_one_shared_login_has_to_be_in_the_roles_that_it_asks_for(logins: str) -> None:
    await check_roles(Book(url=Secret(login_url(logins, "login_both")), roles="shared"))
    in_neither = await look_at(login_url(logins, "login_both"))

    assert wrong_shared(in_neither, WORKER) == [
        "login_both acts as login_both and not as farebox_worker: is there a pooler between?"
    ]


async def test_the_owner_migrates_and_then_sees_nothing_by_that(own_url: str) -> None:
    applied = await migrate(own_url)
    conn = await asyncpg.connect(own_url)
    await conn.execute(
        "INSERT INTO operator_keys SELECT gen_random_uuid(), 'o', 'last', $1", b"d" * 32
    )
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await conn.execute("INSERT INTO users (id) VALUES (gen_random_uuid())")
    found = await look_at(own_url)
    await conn.close()

    assert applied == [m.name for m in read_migrations()]
    assert wrong_worker(found) == [
        "login_owner owns tables (app_api_keys, billing_accounts, chain_cursors, ...):"
        " that is for migrations only",
        "login_owner is no member of farebox_worker (GRANT farebox_worker TO login_owner)",
    ]


async def test_a_migration_that_moves_rows_never_misses_any_in_silence(own_url: str) -> None:
    await migrate(own_url)
    known = read_migrations()
    move = "UPDATE users SET label = 'moved'"
    lifted = (
        f"ALTER TABLE users NO FORCE ROW LEVEL SECURITY; {move};"
        " ALTER TABLE users FORCE ROW LEVEL SECURITY"
    )
    number = len(known) + 1

    with pytest.raises(MigrationError, match="would be affected by row-level security"):
        await migrate(own_url, [*known, Migration(number, f"{number:04}_move.sql", move)])
    name = f"{number:04}_moves.sql"
    assert await migrate(own_url, [*known, Migration(number, name, lifted)]) == [name]


def worker(url: str) -> str:
    return login_url(url, "login_worker")


def separate(url: str, for_worker: str, for_request: str) -> Book:
    request_url = login_url(url, for_request) if for_request else ""
    return Book(url=Secret(login_url(url, for_worker)), request_url=Secret(request_url))


def test_a_role_is_added_to_any_url() -> None:
    assert as_role("postgresql://h/d", REQUEST) == "postgresql://h/d?role=farebox_request"
    assert as_role("postgresql://h/d?a=b", WORKER) == "postgresql://h/d?a=b&role=farebox_worker"
