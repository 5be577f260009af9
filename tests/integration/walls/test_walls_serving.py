"""A gateway as in production: a login for each role, none of them an owner or a superuser."""

import asyncio
import os
import re
import signal
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from config.ids import read_id
from gateway.embedded.postgres import programs
from migrations.runner import Migration, MigrationError, migrate, read_migrations
from tests.conftest import database_url
from tests.support.farebox import PEPPER, Done, farebox, running_serve
from tests.support.gateway import eventually
from tests.support.rawclient import Outcome, chat, connect, exchange
from tests.support.walls import PASSWORD, login_url, make_logins

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "production.md"
CONFIG = """
[keys]
mode = "test"
[metrics]
open = true
[till]
hold_lease_s = 1
renew_every_s = 0.2
[work]
every_s = 0.2
sweep_grace_s = 0.5
takeover_after_s = 0.3
[providers.slow]
kind = "echo"
chunk_delay_ms = 20
output_tokens = 400
[models.echo]
routes = [{ provider = "slow" }]
price = { input_usd_per_mtok = "1", output_usd_per_mtok = "4" }
output_tokens_max = 400
"""


@pytest.fixture
def env(logins: str, till_url: str, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "own.toml").write_text(CONFIG)
    return {
        "FAREBOX_DATABASE_URL": login_url(logins, "login_worker"),
        "FAREBOX_BOOK__REQUEST_URL": login_url(logins, "login_request"),
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
        "FAREBOX_CONFIG": "own.toml",
    }


async def call(base_url: str, key: str, tokens: int, **more: Any) -> Outcome:
    messages = [{"role": "user", "content": "hello"}]
    payload = {"model": "echo", "messages": messages, "max_tokens": tokens, **more}
    return await exchange(base_url, chat(key, payload), deadline=30)


async def test_everything_works_without_the_rights_of_an_owner(
    env: dict[str, str], admin: asyncpg.Connection, tmp_path: Path
) -> None:
    async def cli(*args: str) -> Done:
        return await farebox(*args, "--json", cwd=tmp_path, **env)

    account = (await cli("accounts", "create")).json["billing_account_id"]
    made, _ = await asyncio.gather(
        cli("keys", "create", "--account", account, "--name", "k"),
        cli("credits", "grant", account, "1000"),
    )
    key = made.json["api_key"]
    with running_serve(tmp_path, **env) as server:
        answers = await asyncio.gather(
            *(call(server.base_url, key, 2, stream=at % 2 == 0) for at in range(20))
        )
        # Somebody has to sweep what this worker leaves.
        (worker,) = server.facts["workers"]
        async with connect(server.base_url, deadline=30) as conn:
            long = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
            await conn.send(chat(key, {**long, "stream": True}))
            await conn.head()
            os.kill(worker, signal.SIGKILL)

        async def swept() -> bool | None:
            count = await admin.fetchval("SELECT count(*) FROM charge_receipts")
            return True if count == 21 else None

        await eventually(swept, 30)
        shown = await asyncio.gather(
            *(cli(*args.split()) for args in ("receipts list", "keys list", "till status")),
            cli("keys", "revoke", made.json["app_key_id"]),
            cli("accounts", "show", account),
            cli("check"),
        )
        server.process.terminate()
        assert await server.exit_status() == 0
    audit = await cli("audit")

    assert {answer.status for answer in answers} == {200}
    assert [done.err for done in shown if done.status] == []
    assert audit.status == 0, audit.out
    assert "roles_shared" not in (tmp_path / "stderr").read_text()


async def test_nobody_serves_or_works_as_a_superuser(
    env: dict[str, str], logins: str, tmp_path: Path
) -> None:
    as_super = {**env, "FAREBOX_DATABASE_URL": logins}
    alone = {name: url for name, url in as_super.items() if "REQUEST" not in name}
    weak = {"FAREBOX_KEYS__PEPPER": "change-me", "FAREBOX_METRICS__TOKEN": "x"}
    serve, check, work, missing = await asyncio.gather(
        farebox("serve", "--port", "0", cwd=tmp_path, **as_super),
        farebox("check", cwd=tmp_path, **as_super),
        farebox("work", cwd=tmp_path, **alone),
        farebox("serve", "--port", "0", cwd=tmp_path, **{**alone, **weak}),
    )

    said = "farebox: FAREBOX_DATABASE_URL: farebox is a superuser\n"
    assert (serve.status, serve.err) == (78, said)
    assert (check.status, check.err) == (78, said)
    assert (work.status, work.err) == (78, said)
    assert missing.status == 78
    assert missing.err.splitlines() == [
        "farebox: FAREBOX_BOOK__REQUEST_URL: not set",
        "farebox: FAREBOX_KEYS__PEPPER: shorter than 32 characters;"
        " use at least 32 random characters",
        "farebox: FAREBOX_METRICS__TOKEN: shorter than 16 characters;"
        " use at least 16 random characters",
    ]


async def test_one_login_for_everything_is_for_development_and_says_so(
    env: dict[str, str], logins: str, tmp_path: Path
) -> None:
    shared = {name: text for name, text in env.items() if "REQUEST" not in name}
    shared |= {"FAREBOX_DATABASE_URL": logins, "FAREBOX_BOOK__ROLES": "shared"}

    with running_serve(tmp_path, **shared):
        said = (tmp_path / "stderr").read_text()

    assert said.count('"book.roles_shared"') == 1


def sql_of_the_guide(starts: str, database: str) -> str:
    """A block of SQL that operators are told to run, for a database and with a password of ours."""
    blocks = re.findall(r"```sql\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(starts))
    for role in ("farebox_request", "farebox_worker"):
        block = block.replace(f"CREATE ROLE {role} NOLOGIN;\n", "")
    block = block.replace("DATABASE farebox ", f"DATABASE {database} ")
    return block.replace("PASSWORD '...'", f"PASSWORD '{PASSWORD}'")


async def test_what_the_guide_says_makes_a_book_that_passes_and_can_be_backed_up(
    env: dict[str, str], postgres_url: str, tmp_path: Path
) -> None:
    admin = await asyncpg.connect(postgres_url)
    for statement in sql_of_the_guide("CREATE ROLE farebox_request", "guided").splitlines():
        await admin.execute(statement)
    guided = database_url(postgres_url, "guided")
    own = {
        **env,
        "FAREBOX_DATABASE_URL": login_url(guided, "farebox_serve"),
        "FAREBOX_BOOK__REQUEST_URL": login_url(guided, "farebox_tenant"),
    }
    (tmp_path / "owner").write_text(login_url(guided, "farebox_owner"))
    owner = {"FAREBOX_BOOK__MIGRATE_URL_FILE": str(tmp_path / "owner")}
    try:
        before = await farebox("check", cwd=tmp_path, **own)
        migrated = await farebox("migrate", "--json", cwd=tmp_path, **{**own, **owner})
        after = await farebox("check", cwd=tmp_path, **own)
        made = await farebox("accounts", "create", "--json", cwd=tmp_path, **own)
        for statement in sql_of_the_guide("CREATE ROLE farebox_backup", "guided").splitlines():
            await admin.execute(statement)
        backup = login_url(guided, "farebox_backup")
        dumped = await asyncio.create_subprocess_exec(
            *(programs() / "pg_dump", "--enable-row-security", backup), stdout=PIPE
        )
        dump, _ = await dumped.communicate()
    finally:
        await admin.execute("DROP DATABASE guided WITH (FORCE)")
        logins = ("farebox_owner", "farebox_serve", "farebox_tenant", "farebox_backup")
        await admin.execute(f"DROP ROLE IF EXISTS {', '.join(logins)}")
        await admin.close()

    assert (before.status, "run farebox migrate" in before.err) == (1, True)
    assert migrated.json["applied"]
    assert (after.status, after.err) == (0, "")
    assert (dumped.returncode, made.status) == (0, 0)
    assert str(read_id(made.json["billing_account_id"])) in dump.decode()


def renamed(to: str) -> list[Migration]:
    """The migrations with roles that this cluster does not have yet."""
    return [
        Migration(m.number, m.name, m.sql.replace("farebox_", f"{to}_")) for m in read_migrations()
    ]


async def test_databases_of_one_cluster_may_be_migrated_at_once(postgres_url: str) -> None:
    names = [f"at_once_{number}" for number in range(3)]
    urls = [database_url(postgres_url, name) for name in names]
    roles = ["race_request", "race_worker"]
    admin = await asyncpg.connect(postgres_url)
    try:
        for name in names:
            await admin.execute(f"CREATE DATABASE {name}")
        applied = await asyncio.gather(*(migrate(url, renamed("race")) for url in urls))
        made = await admin.fetchval(
            "SELECT count(*) FROM pg_roles WHERE rolname = ANY($1::text[])", roles
        )
    finally:
        for name in names:
            await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"DROP ROLE IF EXISTS {', '.join(roles)}")
        await admin.close()

    assert [len(names) for names in applied] == [len(read_migrations())] * 3
    assert made == 2


async def test_an_owner_who_may_not_make_the_roles_is_told_what_to_run(
    postgres_url: str, template_url: str
) -> None:
    await make_logins(postgres_url)
    admin = await asyncpg.connect(postgres_url)
    await admin.execute("CREATE DATABASE unprepared OWNER login_owner")
    url = login_url(database_url(postgres_url, "unprepared"), "login_owner")
    try:
        with pytest.raises(
            MigrationError, match=r"login_owner may not create roles: .*CREATE ROLE"
        ):
            await migrate(url, renamed("absent"))
        await admin.execute("CREATE ROLE absent_request NOLOGIN; CREATE ROLE absent_worker NOLOGIN")
        applied = await migrate(url, renamed("absent"))
    finally:
        await admin.execute("DROP DATABASE unprepared WITH (FORCE)")
        await admin.execute("DROP ROLE IF EXISTS absent_request, absent_worker")
        await admin.close()

    names = [migration.name for migration in read_migrations()]
    assert applied == names[names.index("0005_walls.sql") :]
