# ruff: noqa: S608 (these statements are built to do harm, and only to copies)
"""Ways to corrupt what was paid in: name: (invariant, what the finding says, SQL)."""

from billing.audit import Invariant
from tests.support.audit_corruptions import A, append

L5 = Invariant.DEPOSITS
# Of three transfers that were credited, one was so twice and one stays lost.
STANDING = "(SELECT tx_hash FROM chain_transfers WHERE state = 'credited' AND generation = 1)"
LOST = "(SELECT tx_hash FROM chain_transfers WHERE state = 'reversed')"
DEPOSIT = f"""UPDATE credit_ledger SET {{}}
    WHERE reason = 'deposit' AND reference LIKE '%' || {STANDING} || '%'"""
TRANSFER = f"UPDATE chain_transfers SET {{}} WHERE tx_hash = {STANDING}"
DEPOSITS = {
    "a deposit that no transfer stands for": (
        L5,
        "deposit without a transfer",
        append("5", "deposit", "'0xabc'"),
    ),
    "a deposit twice": (
        L5,
        "deposits of a transfer",
        append("7000", "deposit", f"'8453:' || {STANDING} || ':0'"),
    ),
    "a deposit is gone": (
        L5,
        "deposits of a transfer",
        DEPOSIT.format("reason = 'adjust'"),
    ),
    "a deposit off by a nano": (
        L5,
        "amount of a deposit",
        DEPOSIT.format("amount_nanos = amount_nanos + 1"),
    ),
    "a deposit of another account": (
        L5,
        "who was credited",
        DEPOSIT.format(f"billing_account_id = {A}"),
    ),
    "a deposit without its first reversal": (
        L5,
        "reversals of a deposit",
        "DELETE FROM credit_ledger WHERE reason = 'reversal' AND reference LIKE "
        f"'%' || {LOST} || '%'",
    ),
    "a reversal of what stands": (
        L5,
        "reversals of a deposit",
        append("-7000", "reversal", f"'8453:' || {STANDING} || ':0'"),
    ),
    "a reversal off by a nano": (
        L5,
        "amount of a reversal",
        "UPDATE credit_ledger SET amount_nanos = amount_nanos - 1 WHERE reason = 'reversal'",
    ),
    "a reversal that no transfer stands for": (
        L5,
        "reversal without a transfer",
        append("-5", "reversal", "'8453:0xabc:0'"),
    ),
    "a credited transfer is gone": (
        L5,
        "deposit without a transfer",
        f"DELETE FROM chain_transfers WHERE tx_hash = {STANDING}",
    ),
    "a transfer of other units": (
        L5,
        "nanos of a transfer",
        TRANSFER.format("units = units + 1"),
    ),
    "a transfer twice": (
        L5,
        "transfers of one key",
        "INSERT INTO chain_transfers SELECT * FROM chain_transfers WHERE state = 'suspense'",
    ),
    "a transfer that came back without a credit": (
        L5,
        "deposits of a transfer",
        f"UPDATE chain_transfers SET state = 'credited', generation = 2 WHERE tx_hash = {LOST}",
    ),
    "an attempt that nothing was credited for": (
        L5,
        "transfers of a credited attempt",
        "UPDATE chain_transfers SET payment_attempt_id = NULL",
    ),
}
