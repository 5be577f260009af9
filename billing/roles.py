"""Whom we are to Postgres: the roles of migration 0005, and whether a login is what it should be.

`farebox_request` sees one account at a time, `farebox_worker` all of them; neither owns a table.
Either there is a login for each, or (in development) one login that acts as both.
Failure: BookUnavailable.
"""

from typing import Any

import msgspec

from billing.book import connect, translated
from config.settings import Book

REQUEST, WORKER = "farebox_request", "farebox_worker"
# Members of these can make themselves superusers, or read and write past every wall.
MIGHTY = (
    "pg_execute_server_program",
    "pg_read_server_files",
    "pg_write_server_files",
    "pg_write_all_data",
)
APPEND_ONLY = (
    *("charge_receipts", "credit_ledger", "model_prices"),
    *("payment_events", "payment_intents"),
)


def worker_url(settings: Book) -> str:
    """Where everything but the tenants' own routes enters."""
    url = settings.url.reveal()
    return as_role(url, WORKER) if settings.roles == "shared" else url


def request_url(settings: Book) -> str:
    """Where code enters that acts for one tenant."""
    if settings.roles == "shared":
        return as_role(settings.url.reveal(), REQUEST)
    # An empty one would lead wherever the environment of libpq says.
    assert settings.request_url
    return settings.request_url.reveal()


def as_role(url: str, role: str) -> str:
    """The URL, entering as the role. What Postgres does not know of a URL is a start-up setting."""
    return f"{url}{'&' if '?' in url else '?'}role={role}"


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection may do, by itself and as any role that it may become."""

    login: str
    acts_as: str
    database: int
    accounts: int
    """The oid of the table of accounts: two URLs must lead to the same."""
    superusers: list[str]
    bypassing: list[str]
    creating_roles: list[str]
    replicating: list[str]
    mighty: list[str]
    owned: list[str]
    changeable: list[str]
    unwalled: list[str]
    reading_secrets: list[str]
    """Roles that may read operators' digests or sealed credentials."""
    may_create: bool
    is_worker: bool
    is_request: bool
    may_become_worker: bool


SELECT_LOGIN = """
WITH reach AS (
    SELECT oid, rolname::text AS name, rolsuper, rolbypassrls, rolcreaterole, rolreplication
    FROM pg_roles
    WHERE pg_has_role(session_user, oid, 'MEMBER')
),
tables AS (
    SELECT oid, relname::text AS name, relowner, relrowsecurity AND relforcerowsecurity AS is_walled
    FROM pg_class
    WHERE relkind IN ('r', 'p') AND relnamespace = current_schema()::regnamespace
)
SELECT
    session_user::text AS login,
    current_user::text AS acts_as,
    (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) AS database,
    to_regclass('billing_accounts')::oid::bigint AS accounts,
    ARRAY(SELECT name FROM reach WHERE rolsuper ORDER BY name) AS superusers,
    ARRAY(SELECT name FROM reach WHERE rolbypassrls ORDER BY name) AS bypassing,
    ARRAY(SELECT name FROM reach WHERE rolcreaterole ORDER BY name) AS creating_roles,
    ARRAY(SELECT name FROM reach WHERE rolreplication ORDER BY name) AS replicating,
    ARRAY(SELECT name FROM reach WHERE name = ANY($1::text[]) ORDER BY name) AS mighty,
    ARRAY(
        SELECT name FROM tables WHERE pg_has_role(session_user, relowner, 'MEMBER') ORDER BY name
    ) AS owned,
    ARRAY(
        SELECT name FROM tables
        WHERE name = ANY($2::text[])
            AND (has_table_privilege(session_user, oid, 'DELETE, TRUNCATE')
                 OR has_any_column_privilege(session_user, oid, 'UPDATE'))
        ORDER BY name
    ) AS changeable,
    ARRAY(
        SELECT t.name
        FROM tables AS t
        WHERE NOT t.is_walled AND EXISTS (SELECT FROM pg_policy AS p WHERE p.polrelid = t.oid)
        ORDER BY t.name
    ) AS unwalled,
    ARRAY(
        SELECT name FROM reach
        WHERE has_table_privilege(oid, 'operator_keys', 'SELECT')
            OR has_column_privilege(oid, 'upstream_credentials', 'sealed', 'SELECT')
        ORDER BY name
    ) AS reading_secrets,
    has_schema_privilege(session_user, current_schema(), 'CREATE') AS may_create,
    pg_has_role(session_user, 'farebox_worker', 'USAGE') AS is_worker,
    pg_has_role(session_user, 'farebox_request', 'USAGE') AS is_request,
    pg_has_role(session_user, 'farebox_worker', 'MEMBER') AS may_become_worker
"""


async def look_at(url: str) -> Login:
    """What the login of a URL may do. The schema is this release's."""
    conn = await connect(url)
    try:
        async with translated():
            row: Any = await conn.fetchrow(SELECT_LOGIN, list(MIGHTY), list(APPEND_ONLY))
        return Login(**dict(row))
    finally:
        await conn.close(timeout=5)


def wrong_worker(found: Login) -> list[str]:
    """Why this login must not serve as farebox_worker; nothing when it may."""
    wrong = [] if found.is_worker else [_no_member(found, WORKER)]
    return [*_too_mighty(found), *wrong]


def wrong_request(found: Login, worker: Login) -> list[str]:
    """Why this login must not serve tenants beside that worker; nothing when it may."""
    wrong = _too_mighty(found)
    if found.login == worker.login:
        wrong.append(f"{found.login} is the login of book.url too: give it one of its own")
    elif found.may_become_worker and not found.superusers:
        wrong.append(f"{found.login} is a member of {WORKER}, which sees every account")
    elif found.reading_secrets and not found.superusers:
        roles = ", ".join(found.reading_secrets)
        wrong.append(f"{found.login} may read operators' keys or sealed credentials (as {roles})")
    if not found.is_request:
        wrong.append(_no_member(found, REQUEST))
    if (found.database, found.accounts) != (worker.database, worker.accounts):
        wrong.append("leads to another database than book.url")
    return wrong


def wrong_shared(found: Login, role: str) -> list[str]:
    """Why a connection of a shared login is not in the role that it asked for."""
    if found.acts_as == role:
        return []
    return [f"{found.login} acts as {found.acts_as} and not as {role}: is there a pooler between?"]


def _too_mighty(found: Login) -> list[str]:
    """What no login that serves may be or do."""
    who = found.login
    # All the rest follows from either.
    if who in found.superusers:
        return [f"{who} is a superuser"]
    if found.superusers:
        return [f"{who} may become a superuser ({', '.join(found.superusers)})"]
    said = {
        "bypasses row level security": found.bypassing,
        "may create roles": found.creating_roles,
        "may copy the whole cluster": found.replicating,
        "can get at every row": found.mighty,
    }
    wrong = [f"{who} {what} (as {', '.join(roles)})" for what, roles in said.items() if roles]
    if found.owned:
        wrong.append(f"{who} owns tables ({_some(found.owned)}): that is for migrations only")
    elif found.changeable:
        wrong.append(f"{who} may change what is append-only ({', '.join(found.changeable)})")
    if found.may_create and not found.owned:
        wrong.append(f"{who} may create tables (REVOKE CREATE ON SCHEMA ... FROM PUBLIC)")
    if found.unwalled:
        wrong.append(f"row level security is not forced on {', '.join(found.unwalled)}")
    return wrong


def _no_member(found: Login, role: str) -> str:
    return f"{found.login} is no member of {role} (GRANT {role} TO {found.login})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
