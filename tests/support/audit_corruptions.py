# ruff: noqa: S608 (these statements are built to do harm, and only to copies)
"""Ways to corrupt a copy of the book: name: (invariant, what the finding says, SQL)."""

from billing.audit import Invariant

PLAIN_KEY = "fb_live_" + "A1b2" * 9 + "zz"

# One account, and one receipt with a price of which everything is known.
A = "(SELECT billing_account_id FROM credit_ledger WHERE reason = 'charge' ORDER BY 1 LIMIT 1)"
OTHER = "(SELECT max(id::text)::uuid FROM billing_accounts)"
R = f"""(SELECT request_id FROM charge_receipts WHERE billing_account_id = {A}
    AND cost_source = 'price_book' AND outcome = 'complete' AND requested_model = 'plain'
    ORDER BY price_nanos DESC LIMIT 1)"""
P = "(SELECT request_id FROM charge_receipts WHERE reported_cost_usd > 0 ORDER BY 1 LIMIT 1)"
LAST = f"(SELECT max(seq) FROM credit_ledger WHERE billing_account_id = {A})"
GRANT = "(SELECT min(reference) FROM credit_ledger WHERE reason = 'grant')"
# What a sweeper ended: corrected afterwards, and not.
ADJUST = "(SELECT reference::uuid FROM credit_ledger WHERE reason = 'adjust' ORDER BY seq LIMIT 1)"
GUESS = """(SELECT request_id FROM charge_receipts WHERE usage_source = 'checkpoint'
    AND outcome = 'recovered' AND request_id::text NOT IN
        (SELECT reference FROM credit_ledger WHERE reason = 'adjust') ORDER BY 1 DESC LIMIT 1)"""
GUESSED = f"UPDATE charge_receipts SET {{}} WHERE request_id = {GUESS}"
VOIDED = """UPDATE charge_receipts SET {}
    WHERE usage_source = 'checkpoint' AND outcome = 'voided'"""
ADJUSTED = f"UPDATE credit_ledger SET {{}} WHERE reason = 'adjust' AND reference = {ADJUST}::text"
LEDGER = f"UPDATE credit_ledger SET {{}} WHERE billing_account_id = {A} AND seq = {{}}"
RECEIPT = f"UPDATE charge_receipts SET {{}} WHERE request_id = {R}"
REPORTED = f"UPDATE charge_receipts SET {{}} WHERE request_id = {P}"
CHARGE = f"UPDATE credit_ledger SET {{}} WHERE reason = 'charge' AND reference = {R}::text"
SPEND = f"""UPDATE scope_spend SET {{}} WHERE virtual_key_id =
    (SELECT virtual_key_id FROM charge_receipts WHERE request_id = {R})"""
ACCOUNT = f"UPDATE billing_accounts SET {{}} WHERE id = {A}"


def append(amount: str, reason: str, reference: str) -> str:
    """A row at the end of A's ledger, and its account: a chain without a fault."""
    return f"""
        WITH a AS (UPDATE billing_accounts SET version = version + 1,
                   balance_nanos = balance_nanos + {amount} WHERE id = {A}
                   RETURNING id, version, balance_nanos)
        INSERT INTO credit_ledger (billing_account_id, seq, balance_before_nanos, amount_nanos,
            balance_after_nanos, reason, reference, virtual_key_id, app_key_id)
        SELECT a.id, a.version, a.balance_nanos - {amount}, {amount}, a.balance_nanos,
               '{reason}', {reference}, k.virtual_key_id, k.id
        FROM a JOIN app_api_keys AS k ON k.billing_account_id = a.id"""


def many_receipts(change: str) -> str:
    """1,000 more receipts that cost nothing, alike but for a change."""
    return f"""
        CREATE TEMP TABLE more AS SELECT * FROM charge_receipts WHERE outcome = 'voided' LIMIT 1;
        UPDATE more SET {change};
        INSERT INTO charge_receipts SELECT more.* FROM more, generate_series(1, 1000);
        UPDATE charge_receipts SET request_id = gen_random_uuid(),
            source_reference = gen_random_uuid()::text
        WHERE outcome = (SELECT outcome FROM more) AND price_nanos = 0"""


L1, L2, L3, L4 = Invariant.LEDGER, Invariant.CHARGES, Invariant.MARGIN, Invariant.PRICE
L6, L7, L8 = Invariant.TILL, Invariant.AGES, Invariant.KEYS

BOOK = {
    "a row in the middle is gone": (
        L1,
        "seq",
        f"DELETE FROM credit_ledger WHERE billing_account_id = {A} AND seq = 3",
    ),
    "the first row is gone": (
        L1,
        "seq",
        f"DELETE FROM credit_ledger WHERE billing_account_id = {A} AND seq = 1",
    ),
    "the last row is gone": (
        L1,
        "version of the account",
        f"DELETE FROM credit_ledger WHERE billing_account_id = {A} AND seq = {LAST}",
    ),
    "a row twice": (
        L1,
        "seq",
        "INSERT INTO credit_ledger (billing_account_id, seq, balance_before_nanos, amount_nanos,"
        " balance_after_nanos, reason, reference) SELECT billing_account_id, seq,"
        " balance_before_nanos, amount_nanos, balance_after_nanos, reason, reference || 'x'"
        f" FROM credit_ledger WHERE billing_account_id = {A} AND seq = 2",
    ),
    "an amount off by a nano": (
        L1,
        "balance after",
        LEDGER.format("amount_nanos = amount_nanos - 1", 4),
    ),
    "a balance off by a nano": (
        L1,
        "balance after",
        LEDGER.format("balance_after_nanos = balance_after_nanos + 1", 4),
    ),
    "a chain with a jump": (
        L1,
        "balance before",
        LEDGER.format(
            "balance_before_nanos = balance_before_nanos + 5, amount_nanos = amount_nanos - 5", 4
        ),
    ),
    "a row moved to the end": (
        L1,
        "seq",
        LEDGER.format("seq = seq + 1", LAST),
    ),
    "a row moved to another account": (
        L1,
        "seq",
        LEDGER.format(f"billing_account_id = {OTHER}", LAST),
    ),
    "a balance that overflows": (
        L1,
        "balance after",
        LEDGER.format("amount_nanos = 9223372036854775807", LAST),
    ),
    "the account's balance off by a nano": (
        L1,
        "balance of the account",
        ACCOUNT.format("balance_nanos = balance_nanos + 1"),
    ),
    "the account's version ahead": (
        L1,
        "version of the account",
        ACCOUNT.format("version = version + 1"),
    ),
    "the account is gone": (
        L1,
        "ledger without an account",
        f"DELETE FROM billing_accounts WHERE id = {A}",
    ),
    "a charge that gives": (
        L1,
        "amount or size of a charge",
        append("5", "charge", "'gives'"),
    ),
    "a grant that takes": (
        L1,
        "amount or size of a grant",
        append("-5", "grant", "'takes'"),
    ),
    "a row of nothing": (
        L1,
        "amount or size of a adjust",
        append("0", "adjust", "'nothing'"),
    ),
    "a receipt is gone": (
        L2,
        "charge without a receipt",
        f"DELETE FROM charge_receipts WHERE request_id = {R}",
    ),
    "a charge of an unknown request": (
        L2,
        "ledger rows of a receipt",
        CHARGE.format("reference = gen_random_uuid()::text"),
    ),
    "a charge called something else": (
        L2,
        "ledger rows of a receipt",
        CHARGE.format("reason = 'adjust'"),
    ),
    "a receipt charged twice": (
        L2,
        "ledger rows of a receipt",
        append("-7", "charge", f"{R}::text"),
    ),
    "a free receipt that was charged": (
        L2,
        "ledger rows of a receipt",
        append(
            "-7",
            "charge",
            "(SELECT min(request_id::text) FROM charge_receipts WHERE price_nanos = 0)",
        ),
    ),
    "a receipt says another price": (
        L2,
        "amount of the charge",
        RECEIPT.format("price_nanos = price_nanos + 1"),
    ),
    "a receipt of another account": (
        L2,
        "who was charged",
        RECEIPT.format(f"billing_account_id = {OTHER}"),
    ),
    "a charge of another key": (
        L2,
        "who was charged",
        CHARGE.format("virtual_key_id = gen_random_uuid()"),
    ),
    "a grant made twice": (
        L2,
        "ledger rows of one reference",
        append("1000000000", "grant", GRANT),
    ),
    "one request with two receipts": (
        L2,
        "receipts of one request",
        "CREATE TEMP TABLE more AS SELECT * FROM charge_receipts WHERE outcome = 'voided' LIMIT 1;"
        "UPDATE more SET request_id = gen_random_uuid();"
        "INSERT INTO charge_receipts SELECT * FROM more",
    ),
    "a day on which a key spent a nano less": (
        L2,
        "spent on a day",
        SPEND.format("spent_nanos = spent_nanos - 1"),
    ),
    "a day that was posted to once more": (
        L2,
        "version of a day",
        SPEND.format("version = version + 1"),
    ),
    "what was spent on another day": (
        L2,
        "spent on a day",
        SPEND.format("window_start = window_start - interval '1 day'"),
    ),
    "a day is gone": (
        L2,
        "spent on a day",
        "DELETE FROM scope_spend",
    ),
    "an adjustment of an unknown request": (
        L2,
        "adjustment without a receipt",
        append("-5", "adjust", "gen_random_uuid()::text"),
    ),
    "an adjustment of what its worker said": (
        L2,
        "adjustment of what nobody guessed",
        append("-5", "adjust", f"{R}::text"),
    ),
    "an adjustment beyond the hold": (
        L2,
        "paid after the adjustment",
        append("-900000000", "adjust", f"{GUESS}::text"),
    ),
    "an adjustment that gives more than was charged": (
        L2,
        "paid after the adjustment",
        append("900000000", "adjust", f"{GUESS}::text"),
    ),
    "an adjustment by one that is not the difference": (
        L2,
        "paid after the adjustment",
        ADJUSTED.format("amount_nanos = 900000000"),
    ),
    "a request adjusted twice": (
        L2,
        "adjustments of a receipt",
        append("-5", "adjust", f"{ADJUST}::text"),
    ),
    "an adjustment on another account": (
        L2,
        "who was adjusted",
        ADJUSTED.format(f"billing_account_id = {A}"),
    ),
    "an adjustment of another key": (
        L2,
        "who was adjusted",
        ADJUSTED.format("app_key_id = gen_random_uuid()"),
    ),
    "a cost above the price": (
        L3,
        "price below cost",
        RECEIPT.format("provider_cost_nanos = price_nanos + 1"),
    ),
    "an overrun that is none": (
        L3,
        "price below cost",
        "UPDATE charge_receipts SET overrun_nanos = 0 WHERE overrun_nanos > 0",
    ),
    "a hold below the price": (
        L4,
        "price above the hold",
        RECEIPT.format("hold_nanos = price_nanos - 1"),
    ),
    "more input tokens": (L4, "price", RECEIPT.format("input_tokens = input_tokens + 100")),
    "fewer output tokens": (L4, "price", RECEIPT.format("output_tokens = output_tokens - 1")),
    "cached tokens forgotten": (L4, "price", RECEIPT.format("cached_tokens = 0")),
    "reasoning tokens forgotten": (L4, "price", RECEIPT.format("reasoning_tokens = 0")),
    "audio tokens forgotten": (L4, "price", RECEIPT.format("audio_output_tokens = 0")),
    "kinds beyond their total": (
        L4,
        "token counts",
        RECEIPT.format("cached_tokens = input_tokens + 1"),
    ),
    "another markup": (L4, "price", RECEIPT.format("markup_bps = 20001")),
    "a markup that loses": (L4, "markup below 1", RECEIPT.format("markup_bps = 9999")),
    "a cost off by a nano": (
        L4,
        "cost",
        RECEIPT.format("provider_cost_nanos = provider_cost_nanos - 1"),
    ),
    "an overrun out of nowhere": (L4, "overrun", RECEIPT.format("overrun_nanos = 1")),
    "another version of the price": (L4, "price", RECEIPT.format("price_version = 3")),
    "the price of another model": (
        L4,
        "price version of another model",
        RECEIPT.format("price_version = 2"),
    ),
    "an unknown price version": (L4, "price version", RECEIPT.format("price_version = 99")),
    "a price version of later": (
        L4,
        "price version of later",
        "UPDATE model_prices SET effective_from = now() + interval '1 day' WHERE price_version = 1",
    ),
    "rates changed afterwards": (
        L4,
        "price",
        "UPDATE model_prices SET input_rate = input_rate + 1000000 WHERE price_version = 1",
    ),
    "a price without a source": (L4, "price", RECEIPT.format("cost_source = 'none'")),
    "another reported cost": (
        L4,
        "price",
        REPORTED.format("reported_cost_usd = reported_cost_usd + 0.000001"),
    ),
    "a reported cost that is no number": (
        L4,
        "reported cost",
        REPORTED.format("reported_cost_usd = 'NaN'"),
    ),
    "a reported cost that is gone": (
        L4,
        "reported cost",
        REPORTED.format("reported_cost_usd = NULL"),
    ),
    "a recovered receipt with the provider's usage": (
        L4,
        "usage of a recovered receipt",
        GUESSED.format("usage_source = 'provider'"),
    ),
    "a checkpoint that is called complete": (
        L4,
        "outcome of a checkpoint",
        GUESSED.format("outcome = 'complete'"),
    ),
    "a checkpoint at the provider's price": (
        L4,
        "cost of a checkpoint",
        GUESSED.format("cost_source = 'provider', reported_cost_usd = 0.001"),
    ),
    "a checkpoint of more tokens": (
        L4,
        "price",
        GUESSED.format("output_tokens = output_tokens + 5"),
    ),
    "a voided checkpoint with tokens": (
        L4,
        "tokens of a voided checkpoint",
        VOIDED.format("output_tokens = 5"),
    ),
    "too many counted receipts": (
        L7,
        "too many counted receipts",
        many_receipts("usage_source = 'counted'"),
    ),
    "too many recovered receipts": (
        L7,
        "too many recovered receipts",
        many_receipts("outcome = 'recovered', usage_source = 'checkpoint'"),
    ),
    "a request after its key was revoked": (
        L8,
        "request of a revoked key",
        "UPDATE app_api_keys SET revoked_at = now() - interval '1 hour' WHERE revoked_at < now()",
    ),
    "a key in the metadata": (
        L8,
        "plaintext key",
        f"""UPDATE credit_ledger SET metadata = '{{"a": ["Bearer {PLAIN_KEY}"]}}' WHERE seq = 1""",
    ),
    "a key in a name": (L8, "plaintext key", f"UPDATE app_api_keys SET name = '{PLAIN_KEY}'"),
    "a key in a receipt": (
        L8,
        "plaintext key",
        RECEIPT.format(f"client_request_id = '{PLAIN_KEY}'"),
    ),
    "a key instead of its digest": (
        L8,
        "plaintext key",
        f"UPDATE app_api_keys SET digest = '{PLAIN_KEY}'::bytea",
    ),
    "a key in somebody's table": (
        L8,
        "plaintext key",
        f'CREATE SCHEMA "Odd one"; CREATE TABLE "Odd one"."my ""table" AS'
        f" SELECT 1 AS r, ARRAY['x', '{PLAIN_KEY}'] AS \"of 'keys\"",
    ),
}
