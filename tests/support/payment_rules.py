"""Each rule of the tables of payments, violated once: what is wrong, and the statement.

One account has payments: an attempt that was credited, and one of which nobody spoke yet.
"""

HASH, ADDRESS, OTHER = f"'0x{'ab' * 32}'", f"'0x{'ab' * 20}'", "gen_random_uuid()"
OWNER = "(SELECT billing_account_id FROM payment_attempts LIMIT 1)"


def intent(**fields: str) -> str:
    values = {
        "id": OTHER,
        "billing_account_id": OWNER,
        "chain_id": "1",
        "token": ADDRESS,
        "treasury": ADDRESS,
        "amount_usd_cents": "100",
        "units": "1000000",
        "expires_at": "now() + interval '1 hour'",
        **fields,
    }
    return _insert("payment_intents", values)


def transfer(**fields: str) -> str:
    values = {
        "chain_id": "1",
        "tx_hash": HASH,
        "ordinal": "0",
        "sender": ADDRESS,
        "units": "5",
        "nanos": "5000",
        "block_number": "7",
        "block_hash": HASH,
        "block_time": "now()",
        "state": "'seen'",
        **fields,
    }
    return _insert("chain_transfers", values)


def event(**fields: str) -> str:
    values = {"event": "'TX_SUBMITTED'", "billing_account_id": OWNER}
    attempt = "(SELECT id FROM payment_attempts LIMIT 1)"
    return _insert("payment_events", {**values, "payment_attempt_id": attempt, **fields})


def cursor(**fields: str) -> str:
    values = {"chain_id": "1", "token": ADDRESS, "treasury": ADDRESS, "block_number": "0"}
    return _insert("chain_cursors", {**values, **fields})


def _insert(table: str, values: dict[str, str]) -> str:
    names, row = ", ".join(values), ", ".join(values.values())
    return f"INSERT INTO {table} ({names}) SELECT {row}"


def attempt(change: str, before: str = "CREATED_INTENT") -> str:
    return f"UPDATE payment_attempts SET {change} WHERE status = '{before}'"  # noqa: S608


def submitted(tx_hash: str) -> str:
    return f"status = 'PENDING_UNVERIFIED', submitted_at = now(), tx_hash = {tx_hash}"


FAILED = "status = 'FAILED', ended_at = now(), error_code = {}"
CREDITED = "UPDATE chain_transfers SET {} WHERE state = 'credited'"
ATTEMPT = "INSERT INTO payment_attempts (id, payment_intent_id, billing_account_id, chain_id"
ENDED = (
    "SELECT gen_random_uuid(), id, billing_account_id, 1, 'CREDITED', now() FROM payment_intents"
)
CLAIMS = {"state": "'credited'", "generation": "1"}
PAYMENTS = {
    "an intent of nobody": intent(billing_account_id=OTHER),
    "an intent on no chain": intent(chain_id="0"),
    "an intent in no token": intent(token="'usdc'"),
    "an intent to nowhere": intent(treasury=ADDRESS.upper()),
    "an intent of almost nothing": intent(amount_usd_cents="99", units="990000"),
    "an intent whose units are others": intent(units="1000001"),
    "an intent that has expired": intent(expires_at="now()"),
    "a change of an intent": "UPDATE payment_intents SET chain_id = 2",
    "a deletion of an intent": "DELETE FROM payment_intents",
    "emptied intents": "TRUNCATE payment_intents CASCADE",
    "an attempt of no intent": f"{ATTEMPT}) SELECT {OTHER}, {OTHER}, " + OWNER + ", 1",
    "an attempt that begins at its end": (f"{ATTEMPT}, status, ended_at) {ENDED} LIMIT 1"),
    "an attempt in no known state": attempt("status = 'ODD'"),
    "an attempt that skips a state": attempt("status = 'CREDITED', ended_at = now()"),
    "an attempt that goes back": attempt("status = 'PENDING_UNVERIFIED'", "CREDITED"),
    "an attempt with an unknown error": attempt(FAILED.format("'ODD'")),
    "an attempt that a lagging node ended": attempt(FAILED.format("'TX_NOT_FOUND'")),
    "a failure without an error": attempt(FAILED.format("NULL")),
    "an end without its time": attempt("status = 'FAILED', error_code = 'INTENT_EXPIRED'"),
    "a submission without a hash": attempt("submitted_at = now()"),
    "a hash that nobody submitted": attempt(f"tx_hash = {HASH}, submitted_at = now()"),
    "a hash in capitals": attempt(submitted(f"upper({HASH})")),
    "a hash of another attempt": attempt(submitted("(SELECT tx_hash FROM chain_transfers)")),
    "another hash for an attempt": attempt(f"tx_hash = {HASH}", "CREDITED"),
    "an attempt given away": attempt(f"billing_account_id = {OTHER}"),
    "a deletion of an attempt": "DELETE FROM payment_attempts",
    "emptied attempts": "TRUNCATE payment_attempts CASCADE",
    "a transfer on no chain": transfer(chain_id="0"),
    "a transfer without a hash": transfer(tx_hash="'0xab'"),
    "a transfer before the first": transfer(ordinal="-1"),
    "a transfer from nowhere": transfer(sender="'0xab'"),
    "a transfer of nothing": transfer(units="0", nanos="0"),
    "a transfer whose nanos are others": transfer(nanos="5001"),
    "a transfer before all blocks": transfer(block_number="-1"),
    "a transfer in no block": transfer(block_hash="'0xab'"),
    "a transfer in no known state": transfer(state="'odd'"),
    "a suspense without a reason": transfer(state="'suspense'"),
    "a suspense for no known reason": transfer(state="'suspense'", suspense_reason="'whim'"),
    "a credit of nobody": transfer(**CLAIMS),
    "a credit of no account": transfer(**CLAIMS, billing_account_id=OTHER),
    "a transfer of a negative generation": transfer(generation="-1"),
    "a transfer for an attempt of nobody": transfer(
        payment_attempt_id="(SELECT id FROM payment_attempts LIMIT 1)"
    ),
    "a transfer for no attempt": transfer(billing_account_id=OWNER, payment_attempt_id=OTHER),
    "a credit that changes its amount": CREDITED.format("units = 1, nanos = 1000"),
    "a credit that changes its owner": CREDITED.format("billing_account_id = NULL"),
    "a credit that is only seen": CREDITED.format("state = 'seen'"),
    "a credit that counts itself twice": CREDITED.format("generation = generation + 1"),
    "a deletion of a transfer": "DELETE FROM chain_transfers",
    "emptied transfers": "TRUNCATE chain_transfers CASCADE",
    "an event of no known kind": event(event="'ODD'"),
    "an event of nothing": event(payment_attempt_id="NULL::uuid"),
    "an event of no attempt": event(payment_attempt_id=OTHER),
    "an event of no transfer": event(
        event="'TRANSFER_CHANGED'", chain_id="1", tx_hash=HASH, ordinal="0"
    ),
    "a change of an event": "UPDATE payment_events SET metadata = '{}'",
    "a deletion of an event": "DELETE FROM payment_events",
    "emptied events": "TRUNCATE payment_events",
    "a cursor on no chain": cursor(chain_id="0"),
    "a cursor of no token": cursor(token="'usdc'"),
    "a cursor to nowhere": cursor(treasury="'here'"),
    "a cursor before all blocks": cursor(block_number="-1"),
}
# What a trigger refuses first, or another constraint of the same table says, too.
REPEATED_BY_PAYMENTS = {
    "attempt_status_is_known",
    "payment_attempts_id_billing_account_id_key",
    "payment_intents_id_billing_account_id_key",
}
