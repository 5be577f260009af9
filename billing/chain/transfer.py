"""What a payment is on the chain. Pure."""

from datetime import datetime

import msgspec

# USDC has 6 decimals, a nano is 1e-9 USD.
NANOS_PER_UNIT = 1000
# What the book's bigint can count: nine thousand million dollars.
UNITS_MAX = (2**63 - 1) // NANOS_PER_UNIT


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """One USDC Transfer log to the treasury, as the chain has it now."""

    chain_id: int
    tx_hash: str
    """^0x[0-9a-f]{64}$"""
    ordinal: int
    """Of the log inside the receipt, from 0: a reorganisation changes its index in the block."""
    sender: str
    """Lower-case 0x address of Transfer.from."""
    units: int
    """USDC base units, > 0."""
    block_number: int
    block_hash: str
    block_time: datetime


def transfer_nanos(transfer: Transfer) -> int:
    """What the sender's account is credited: exactly this, whatever the intent said."""
    return transfer.units * NANOS_PER_UNIT


def predates(transfer: Transfer, created_at: datetime) -> bool:
    """True when the block is older than the intent; blocks have whole seconds."""
    return transfer.block_time < created_at.replace(microsecond=0)
