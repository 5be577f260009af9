"""Every SQL statement of the product is prepared on the migrated schema.

A statement is an upper-case string constant that begins with a verb of SQL. A misspelt column or a
wrong cast shows here, also in code that no other test runs.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("billing", "keys", "migrations", "gateway")
NAME = re.compile(r"^_?[A-Z][A-Z0-9_]*$")
VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH", "LOCK", "SET", "CREATE", "VALUES", "MERGE")
# What Postgres cannot prepare is run instead, in a transaction that is taken back.
UTILITY = ("SET", "CREATE", "LOCK")


def statements() -> Iterator[tuple[str, str]]:
    """(module.NAME, text) of every SQL constant."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            names = list(_constants(ast.parse(path.read_text("utf-8"))))
            if not names:
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            for name in names:
                text = getattr(module, name)
                if isinstance(text, str) and text.lstrip().startswith(VERBS):
                    yield f"{module.__name__}.{name}", text


def _constants(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str() as text)):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str() as text)):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.JoinedStr()):
                text = "SELECT"  # formatted SQL: import it and look
            case _:
                continue
        if NAME.match(name) and text.lstrip().startswith(VERBS):
            yield name


FOUND = list(statements())


@pytest.mark.parametrize("text", [text for _, text in FOUND], ids=[name for name, _ in FOUND])
def test_a_statement_is_one_and_takes_its_values_as_parameters(text: str) -> None:
    assert ";" not in text.rstrip().rstrip(";")
    assert "{" not in text.replace("'{}'", "")
    assert not re.search(r"\bSELECT\s+\*(?!\s+FROM\s+(unnest|json_to_recordset))", text)


async def test_every_statement_fits_the_migrated_schema(book_url: str) -> None:
    conn = await asyncpg.connect(book_url)
    wrong = []
    for name, text in FOUND:
        try:
            await try_out(conn, text)
        except asyncpg.ActiveSQLTransactionError:
            continue  # CREATE DATABASE: it was read, and is not for this place
        except asyncpg.PostgresError as exc:
            wrong.append(f"{name}: {type(exc).__name__}: {exc}")
    await conn.close()

    assert not wrong, "\n".join(wrong)


async def try_out(conn: asyncpg.Connection, text: str) -> None:
    if not text.lstrip().startswith(UTILITY):
        await conn.prepare(text)
        return
    async with conn.transaction():
        await conn.execute(text)


async def test_a_misspelt_column_would_be_found(book_url: str) -> None:
    conn = await asyncpg.connect(book_url)
    try:
        with pytest.raises(asyncpg.UndefinedColumnError):
            await conn.prepare("SELECT balance_nano FROM billing_accounts")
    finally:
        await conn.close()


def test_the_statements_that_move_money_are_among_them() -> None:
    names = {name for name, _ in FOUND}

    assert {
        "billing.posting.POST_RECEIPTS",
        "billing.book.INSERT_LEDGER_ROW",
        "billing.prices_store.SELECT_PRICES",
        "billing.history.SELECT_RECEIPT",
        "keys.store.SELECT_PRINCIPALS",
        "migrations.runner.SELECT_HISTORY",
    } <= names
    assert len(names) >= 25
