"""Each constraint and trigger of the book, violated once: the book refuses, whoever asks."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from billing import book
from billing.book import Pool
from billing.posting import post_receipts
from billing.receipts import ChargeReceipt
from tests.support.books import Account, make_account, open_pool
from tests.support.payment_rules import PAYMENTS, REPEATED_BY_PAYMENTS
from tests.support.payments import intent
from tests.support.walls import add_payment

MAX = 2**53 - 1
# What is wrong, and the statement; $1 is the account, $2 its virtual key, $3 its app key.
LEDGER = """
INSERT INTO credit_ledger (
    billing_account_id, seq, balance_before_nanos, amount_nanos, balance_after_nanos, reason,
    reference
)
VALUES ($1, {seq}, {before}, {amount}, {after}, {reason}, {reference})
"""
KEYS = "UPDATE app_api_keys SET {}"
BUDGETS = "UPDATE virtual_keys SET budget_nanos = {}, budget_window = {}"
COPY = "INSERT INTO charge_receipts ({columns}) SELECT {values} FROM charge_receipts"
BALANCE = "UPDATE billing_accounts SET balance_nanos = {}"
RATES = "input_rate, output_rate, cached_input_rate, cache_write_rate, reasoning_rate"


def ledger(**fields: Any) -> str:
    values = {"seq": 2, "before": 1000, "amount": 5, "after": 1005, "reason": "grant"}
    values |= {"reference": "new", **fields}
    for name in ("reason", "reference"):
        values[name] = f"'{values[name]}'"
    return LEDGER.format(**values)


def key(**fields: str) -> str:
    values = {
        "id": "gen_random_uuid()",
        "billing_account_id": "$1::uuid",
        "virtual_key_id": "gen_random_uuid()",
        "name": "'k'",
        "prefix": "'fb'",
        "last4": "'abcd'",
        "digest": "sha256('x')",
        **fields,
    }
    return f"INSERT INTO app_api_keys ({', '.join(values)}) SELECT {', '.join(values.values())}"


def price(**fields: str) -> str:
    values = {"model": "'m'", "source": "'config'", "effective_from": "now()"}
    values |= dict.fromkeys(RATES.split(", "), "1") | fields
    return f"INSERT INTO model_prices ({', '.join(values)}) SELECT {', '.join(values.values())}"


def claim(**fields: str) -> str:
    values = {
        "virtual_key_id": "$2::uuid",
        "key_digest": "sha256('k')",
        "body_digest": "sha256('b')",
        "request_id": "gen_random_uuid()",
        **fields,
    }
    columns, row = ", ".join(values), ", ".join(values.values())
    return f"INSERT INTO idempotent_requests ({columns}) SELECT {row}"


def copied_receipt(column: str, value: str) -> str:
    """The receipt that is there, once more, with one column changed."""
    columns = (
        "request_id, source_system, source_reference, billing_account_id, virtual_key_id, "
        "charge_reason, protocol, provider, requested_model, input_tokens, output_tokens, "
        "provider_cost_nanos, price_nanos, markup_bps, hold_nanos, cost_source, usage_source, "
        "outcome, provenance, started_at, finished_at, reported_cost_usd"
    )
    values = columns.replace(column, value, 1)
    return COPY.format(columns=columns, values=values)


def credential(**fields: str) -> str:
    values = {
        "virtual_key_id": "$2::uuid",
        "billing_account_id": "$1::uuid",
        "provider": "'p'",
        "sealed": "sha256('s')",
        **fields,
    }
    columns, row = ", ".join(values), ", ".join(values.values())
    return f"INSERT INTO upstream_credentials ({columns}) SELECT {row}"


ACCOUNT = "INSERT INTO billing_accounts (id, owner_user_id) SELECT gen_random_uuid(), "
OWNER = "(SELECT owner_user_id FROM billing_accounts WHERE id = $1::uuid)"
STATEMENTS = {
    "a ledger row that skips a number": ledger(seq=3),
    "a ledger row that repeats a number": ledger(seq=1),
    "a ledger row before the first": ledger(seq=0, before=0, after=5),
    "a ledger row from another balance": ledger(before=999, after=1004),
    "a ledger row whose sum is wrong": ledger(after=1006),
    "a first ledger row that starts from something": ledger(seq=1, before=7, after=12),
    "a ledger row of nothing": ledger(amount=0, after=1000),
    "a grant that takes": ledger(amount=-5, after=995),
    "a deposit that takes": ledger(reason="deposit", amount=-5, after=995),
    "a charge that gives": ledger(reason="charge"),
    "a ledger row for no known reason": ledger(reason="whim"),
    "a ledger row without a reference": ledger(reference=""),
    "a reference that was used": ledger(reference="first"),
    "a ledger balance that the till cannot count": ledger(amount=MAX, after=MAX + 1000),
    "a ledger row of no account": ledger().replace("$1", "gen_random_uuid()"),
    "a change of the ledger": "UPDATE credit_ledger SET metadata = '{}'",
    "a deletion from the ledger": "DELETE FROM credit_ledger",
    "an emptied ledger": "TRUNCATE credit_ledger",
    "a change of a receipt": "UPDATE charge_receipts SET graph_id = 'x'",
    "a deletion of a receipt": "DELETE FROM charge_receipts",
    "emptied receipts": "TRUNCATE charge_receipts",
    "a change of a price": "UPDATE model_prices SET input_rate = 0",
    "a deletion of a price": "DELETE FROM model_prices",
    "emptied prices": "TRUNCATE model_prices CASCADE",
    "a balance that the till cannot count": BALANCE.format(MAX + 1),
    "a debt that the till cannot count": BALANCE.format(-MAX - 1),
    "a balance without a ledger": "UPDATE billing_accounts SET version = 0",
    "a negative version": "UPDATE billing_accounts SET balance_nanos = 0, version = -1",
    "an account in no known state": "UPDATE billing_accounts SET status = 'odd'",
    "an account that may have no request open": "UPDATE billing_accounts SET open_requests_max = 0",
    "a second account of a user": ACCOUNT + OWNER,
    "an account of nobody": ACCOUNT + "gen_random_uuid()",
    "a deletion of an account with a ledger": "DELETE FROM billing_accounts WHERE id = $1",
    "a second default key": "INSERT INTO virtual_keys SELECT gen_random_uuid(), $1::uuid, true",
    "a virtual key of no account": (
        "INSERT INTO virtual_keys SELECT gen_random_uuid(), gen_random_uuid()"
    ),
    "a key of another account's virtual key": key(
        billing_account_id="(SELECT id FROM billing_accounts WHERE id <> $1::uuid LIMIT 1)",
        virtual_key_id="(SELECT id FROM virtual_keys WHERE billing_account_id = $1 AND is_default)",
    ),
    "a key of no virtual key": key(),
    "a virtual key with two keys": key(virtual_key_id="$2::uuid"),
    "a key without a name": "UPDATE app_api_keys SET name = ''",
    "a key with a short digest": "UPDATE app_api_keys SET digest = '\\x00'",
    "two keys with one digest": "UPDATE app_api_keys SET digest = sha256('x')",
    "a key with other last four": "UPDATE app_api_keys SET last4 = 'abc'",
    "a revoked key without its time": "UPDATE app_api_keys SET status = 'revoked'",
    "a revocation time of an active key": "UPDATE app_api_keys SET revoked_at = now()",
    "a key in no known state": "UPDATE app_api_keys SET status = 'odd'",
    "a key that may have no request open": "UPDATE app_api_keys SET open_requests_max = 0",
    "an operator key with a short digest": (
        "INSERT INTO operator_keys SELECT gen_random_uuid(), 'n', 'abcd', '\\x00'"
    ),
    "an operator key without a name": (
        "INSERT INTO operator_keys SELECT gen_random_uuid(), '', 'abcd', sha256('x')"
    ),
    "an operator key with other last four": (
        "INSERT INTO operator_keys SELECT gen_random_uuid(), 'n', 'abc', sha256('x')"
    ),
    "a negative input rate": price(input_rate="-1"),
    "a negative output rate": price(output_rate="-1"),
    "a negative cached rate": price(cached_input_rate="-1"),
    "a negative cache write rate": price(cache_write_rate="-1"),
    "a negative reasoning rate": price(reasoning_rate="-1"),
    "a negative audio input rate": price(audio_input_rate="-1"),
    "a negative audio output rate": price(audio_output_rate="-1"),
    "a price from no known source": price(source="'rumour'"),
    "a price whose number was chosen": price(price_version="7"),
    "a negative spend": "INSERT INTO scope_spend SELECT $2::uuid, now(), -1",
    "a spend that the till cannot count": (
        f"INSERT INTO scope_spend SELECT $2::uuid, now(), {MAX + 1}"
    ),
    "a spend of a negative version": "INSERT INTO scope_spend SELECT $2::uuid, now(), 0, -1",
    "a spend of no key": "INSERT INTO scope_spend SELECT gen_random_uuid(), now()",
    "a second epoch": "INSERT INTO till_epoch (epoch) VALUES (2)",
    "an epoch of another row": "INSERT INTO till_epoch VALUES (false, 2)",
    "a claim with a short key digest": claim(key_digest="'\\x00'"),
    "a claim with a short body digest": claim(body_digest="'\\x00'"),
    "a claim of no key": claim(virtual_key_id="gen_random_uuid()"),
    "an epoch of nothing": "UPDATE till_epoch SET epoch = 0",
    "two operator keys with one digest": (
        "INSERT INTO operator_keys SELECT gen_random_uuid(), 'n', 'abcd', sha256('x') "
        "FROM generate_series(1, 2)"
    ),
    "a receipt for no known reason": copied_receipt("charge_reason", "'whim'"),
    "a receipt whose source has one": copied_receipt("request_id", "gen_random_uuid()"),
    "a wallet of nobody": ("INSERT INTO wallets SELECT '0x' || repeat('a', 40), gen_random_uuid()"),
    "a wallet without an address": (
        "INSERT INTO wallets SELECT 'nobody', owner_user_id FROM billing_accounts"
    ),
    "a wallet of two users": (
        "INSERT INTO wallets SELECT '0x' || repeat(x, 40), owner_user_id "
        "FROM billing_accounts, unnest(ARRAY['a', 'A']) AS x WHERE id = $1"
    ),
    "a wallet of no known kind": (
        "INSERT INTO wallets (address, user_id, kind) "
        "SELECT '0x' || repeat('a', 40), owner_user_id, 'odd' FROM billing_accounts WHERE id = $1"
    ),
    "an account without requests": "UPDATE billing_accounts SET requests_per_minute = 0",
    "an account without tokens": "UPDATE billing_accounts SET tokens_per_minute = 0",
    "a status for a reason without end": (
        "UPDATE billing_accounts SET status_reason = repeat('x', 501)"
    ),
    "a negative budget": BUDGETS.format(-1, "'day'"),
    "a budget that the till cannot count": BUDGETS.format(MAX + 1, "'day'"),
    "a budget of no known window": BUDGETS.format(1, "'hour'"),
    "a budget without a window": BUDGETS.format(1, "NULL"),
    "a window without a budget": BUDGETS.format("NULL", "'day'"),
    "a key without requests": KEYS.format("requests_per_minute = 0"),
    "a key without tokens": KEYS.format("tokens_per_minute = 0"),
    "a key for no model": KEYS.format("models = '{}'"),
    "a key from nowhere": KEYS.format("ip_allow = '{}'"),
    "a key for nothing": KEYS.format("scopes = '{}'"),
    "a key for what nobody knows": KEYS.format("scopes = '{infer,mint}'"),
    "a key of no known kind": KEYS.format("kind = 'odd'"),
    "a key with a short digest before": KEYS.format(
        "previous_digest = '\\x00', previous_expires_at = now()"
    ),
    "two keys with one digest before": KEYS.format(
        "previous_digest = sha256('x'), previous_expires_at = now()"
    ),
    "a digest before without an end": KEYS.format("previous_digest = sha256('x')"),
    "an end of no digest before": KEYS.format("previous_expires_at = now()"),
    "a rotation with a short digest": KEYS.format("rotation_digest = '\\x00'"),
    "a grant without an end": KEYS.format("kind = 'grant'"),
    "a key of a run": KEYS.format("run_id = 'r'"),
    "a key of a graph": KEYS.format("graph_id = 'g'"),
    "a grant of an empty run": KEYS.format("kind = 'grant', expires_at = now(), run_id = ''"),
    "a grant of an empty graph": KEYS.format("kind = 'grant', expires_at = now(), graph_id = ''"),
    "a credential for nobody": credential(provider="''"),
    "a credential in which nothing is sealed": credential(sealed="'\\x00'"),
    "a credential of another account": credential(
        billing_account_id="(SELECT id FROM billing_accounts WHERE id <> $1 LIMIT 1)"
    ),
    "a second system tenant": "UPDATE billing_accounts SET is_system_tenant = true",
    **PAYMENTS,
}


@pytest.fixture
async def pool(book_url: str) -> AsyncIterator[Pool]:
    async with open_pool(book_url) as pool:
        yield pool


async def prepared(pool: Pool) -> Account:
    """Two accounts; the first has a receipt, a ledger and a price."""
    account = await make_account(pool, 0)
    other = await make_account(pool, 0)
    async with book.acquire(pool) as conn:
        await book.grant(conn, account.id, 1000, "first", "")
        await post_receipts(conn, [account.receipt(0)])
        await conn.execute(price())
        await add_payment(conn, other.id)
        await intent(pool, other.id)
    return account


async def violated_by(pool: Pool, account: Account, statement: str) -> str:
    """The constraint that refused it; '' when nothing did."""
    values = (account.id, account.virtual_key_id, account.app_key_id)
    used = [number for number in (1, 2, 3) if f"${number}" in statement]
    for at, number in enumerate(used, 1):
        statement = statement.replace(f"${number}", f"${at}")
    try:
        async with pool.acquire() as conn, conn.transaction():
            await conn.execute(statement, *(values[number - 1] for number in used))
            raise WentThrough
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.GeneratedAlwaysError) as exc:
        return exc.constraint_name or exc.sqlstate or ""
    except WentThrough:
        return ""


async def refused_by(pool: Pool, receipt: ChargeReceipt) -> str:
    """The constraint that refused a receipt; '' when nothing did."""
    try:
        async with book.acquire(pool) as conn:
            await post_receipts(conn, [receipt])
    except book.BookRefused as exc:
        cause = exc.__cause__
        if isinstance(cause, asyncpg.IntegrityConstraintViolationError):
            return cause.constraint_name or cause.sqlstate or ""
    return ""


class WentThrough(Exception):
    """Nothing refused the statement."""


RECEIPTS: dict[str, Callable[[Account], dict[str, Any]]] = {
    "a price above the hold": lambda a: {"hold_nanos": 9},
    "a negative price": lambda a: {"price_nanos": -1},
    "a negative cost": lambda a: {"provider_cost_nanos": -1},
    "a negative hold": lambda a: {"hold_nanos": -1, "price_nanos": 0},
    "a hold that the till cannot count": lambda a: {"hold_nanos": MAX + 1},
    "a negative overrun": lambda a: {"overrun_nanos": -1},
    "an overrun below the hold": lambda a: {"overrun_nanos": 1, "hold_nanos": 11},
    "a markup below the cost": lambda a: {"markup_bps": 9999},
    "a voided receipt with a price": lambda a: {"outcome": "voided"},
    "an unpriced receipt with a price": lambda a: {
        "cost_source": "none",
        "reported_cost_usd": None,
    },
    "a price of the book without a version": lambda a: {
        "cost_source": "price_book",
        "reported_cost_usd": None,
    },
    "a reported cost without the report": lambda a: {"reported_cost_usd": None},
    "a negative reported cost": lambda a: {"reported_cost_usd": -1},
    "a report that nothing rests on": lambda a: {"cost_source": "price_book", "price_version": 1},
    "more cached than input": lambda a: {"input_tokens": 5, "cached_tokens": 6},
    "more kinds than input": lambda a: {
        "input_tokens": 5,
        "cached_tokens": 2,
        "cache_write_tokens": 2,
        "audio_input_tokens": 2,
    },
    "more kinds than output": lambda a: {
        "output_tokens": 5,
        "reasoning_tokens": 3,
        "audio_output_tokens": 3,
    },
    "negative tokens": lambda a: {"input_tokens": -1},
    "negative output": lambda a: {"output_tokens": -1},
    "negative cached": lambda a: {"cached_tokens": -1},
    "negative written": lambda a: {"cache_write_tokens": -1},
    "negative reasoning": lambda a: {"reasoning_tokens": -1},
    "negative audio in": lambda a: {"audio_input_tokens": -1},
    "negative audio out": lambda a: {"audio_output_tokens": -1},
    "no known cost source": lambda a: {"cost_source": "rumour", "reported_cost_usd": None},
    "no known usage source": lambda a: {"usage_source": "rumour"},
    "no known outcome": lambda a: {"outcome": "odd"},
    "no known provenance": lambda a: {"provenance": "odd"},
    "no known window of a budget": lambda a: {"budget_window": "hour"},
    "no attempt": lambda a: {"attempt": 0},
    "failed attempts that are no list": lambda a: {"failed_attempts": {}},
    "negative retries": lambda a: {"client_retry_count": -1},
    "an unknown price version": lambda a: {"price_version": 404},
    "an unknown virtual key": lambda a: {"virtual_key_id": a.id, "app_key_id": None},
    "another key's virtual key": lambda a: {"app_key_id": a.id},
    "no start": lambda a: {"started_at": None},
    "no end": lambda a: {"finished_at": None},
    "no provider": lambda a: {"provider": None},
}


# Checks, references and unique keys; primary keys and NOT NULL are not worth a row each.
CONSTRAINTS = """
SELECT conname
FROM pg_constraint
WHERE contype IN ('c', 'f', 'u') AND connamespace = 'public'::regnamespace
    AND conrelid <> 'schema_migrations'::regclass
"""
# What no row can violate alone: another constraint of the same table says more.
REPEATED = {
    "app_api_keys_id_virtual_key_id_key",
    "virtual_keys_id_billing_account_id_key",
    "credit_ledger_billing_account_id_seq_balance_after_nanos_key",
    "charge_receipts_billing_account_id_fkey",
    *REPEATED_BY_PAYMENTS,
}


async def test_every_rule_of_the_book_refuses_what_it_forbids(pool: Pool) -> None:
    account = await prepared(pool)
    by = {what: await violated_by(pool, account, text) for what, text in STATEMENTS.items()}
    for what, fields in RECEIPTS.items():
        by[what] = await refused_by(pool, account.receipt(10, **fields(account)))
    names = {row["conname"] for row in await pool.fetch(CONSTRAINTS)}

    assert [what for what, name in by.items() if not name] == []
    untried = sorted(names - set(by.values()) - REPEATED)
    assert not untried, "\n".join(untried)
    assert await refused_by(pool, account.receipt(10)) == ""
