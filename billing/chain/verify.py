"""What a receipt says about payments to the treasury, and whether that can still change. Pure.

Only logs count. The sender, receiver and input of the transaction are never read: with smart
wallets these belong to a bundler. Whoever proved Transfer.from owns the credit, whoever submitted.
Each log is a credit of its own; sums are nobody's.
"""

import re
from enum import StrEnum

import msgspec

from billing.chain.errors import BadAnswer, HashMalformed
from billing.chain.transfer import UNITS_MAX, Transfer
from billing.chain.wire import Block, Heads, Log, Receipt
from config.rules import token_address
from config.settings import Chain

# keccak256("Transfer(address,address,uint256)"): https://eips.ethereum.org/EIPS/eip-20
TRANSFER_TOPIC = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
ZERO_ADDRESS = "0x" + "0" * 40
UNITS_PER_USD = 1_000_000
_HASH = re.compile(r"0x[0-9a-f]{64}")
_ADDRESS_TOPIC = re.compile(r"0x0{24}([0-9a-f]{40})")


class Code(StrEnum):
    """Why a payment is not credited, as clients and operators read it."""

    TX_NOT_FOUND = "TX_NOT_FOUND"
    """In no sealed block that enough nodes know: look again."""
    TX_REVERTED = "TX_REVERTED"
    TOKEN_TRANSFER_NOT_FOUND = "TOKEN_TRANSFER_NOT_FOUND"  # noqa: S105 - no password
    """It moved nothing of the token, or the value was zero, or it moved another token."""
    SENDER_MISMATCH = "SENDER_MISMATCH"
    RECIPIENT_MISMATCH = "RECIPIENT_MISMATCH"
    """It moved the token, but not to the treasury."""
    AMOUNT_MISMATCH = "AMOUNT_MISMATCH"
    INSUFFICIENT_CONFIRMATIONS = "INSUFFICIENT_CONFIRMATIONS"
    """Seen, and credited once the block is final enough: look again."""
    RECEIPT_NOT_FOUND = "RECEIPT_NOT_FOUND"
    INTENT_EXPIRED = "INTENT_EXPIRED"
    RPC_ERROR = "RPC_ERROR"
    """The nodes did not answer, disagreed, or answered nonsense: look again."""


class Suspense(StrEnum):
    """Why a transfer is nobody's for now."""

    MINTED = "minted"
    FROM_TREASURY = "from_treasury"
    FROM_SWEEP = "from_sweep"


class ChainRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings say about payments; addresses in lower case."""

    chain_id: int
    token: str
    treasury: str
    sweeps: frozenset[str] = frozenset()
    by_tags: bool = True
    """False: by a plain count of confirmations, for chains without safe and finalized."""
    confirmations: int = 64
    safe_units_max: int = 1000 * UNITS_PER_USD
    safe_units_per_day_max: int = 5000 * UNITS_PER_USD


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One transfer, and what may be done with it."""

    transfer: Transfer
    suspense: Suspense | None
    is_final: bool
    """Deep enough for its own amount; the caller asks again with what the account got today."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """All that one look at a transaction says."""

    code: Code | None
    """None: every finding is final."""
    is_terminal: bool = False
    """Nothing will change any more: without findings the attempt has failed with code."""
    findings: tuple[Finding, ...] = ()


def chain_rules(chain: Chain) -> ChainRules:
    """The rules for these settings, which must have a treasury."""
    assert chain.treasury
    return ChainRules(
        chain_id=chain.id,
        token=token_address(chain).lower(),
        treasury=chain.treasury.lower(),
        sweeps=frozenset(map(str.lower, chain.sweep_addresses)),
        by_tags=chain.finality == "tags",
        confirmations=chain.confirmations,
        safe_units_max=chain.safe_usd_max * UNITS_PER_USD,
        safe_units_per_day_max=chain.safe_usd_per_day_max * UNITS_PER_USD,
    )


def read_hash(text: str) -> str:
    """The one form of a transaction hash. Raises HashMalformed.

    Before anything is stored or compared: else a hash in other letters would be another payment.
    """
    canonical = text.lower()
    if not _HASH.fullmatch(canonical):
        raise HashMalformed
    return canonical


def verdict(
    receipt: Receipt | None, block: Block | None, config: ChainRules, heads: Heads
) -> Verdict:
    """What this receipt proves. block is the one that the nodes have at the receipt's number.

    Never raises: what no honest node answers is RPC_ERROR, so that it is asked again.
    """
    if receipt is None or not _is_sealed(receipt, block):
        return Verdict(code=Code.TX_NOT_FOUND)
    assert block is not None
    is_settled = is_deep_enough(block.number, 0, config, heads)
    if receipt.status != 1:
        code = Code.TX_REVERTED if receipt.status == 0 else Code.RPC_ERROR
        return Verdict(code=code, is_terminal=is_settled and receipt.status == 0)
    try:
        moved = token_transfers(receipt, config.token)
        paid = _paid(moved, config.treasury)
    except BadAnswer:
        return Verdict(code=Code.RPC_ERROR)
    findings = tuple(_finding(each, receipt, block, config, heads) for each in paid)
    if not findings:
        return Verdict(code=_why_nothing(moved), is_terminal=is_settled)
    if not all(finding.is_final for finding in findings):
        return Verdict(code=Code.INSUFFICIENT_CONFIRMATIONS, findings=findings)
    return Verdict(code=None, is_terminal=True, findings=findings)


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """One Transfer log of the token, to whomever."""

    ordinal: int
    sender: str
    to: str
    units: int


def token_transfers(receipt: Receipt, token: str) -> tuple[Moved, ...]:
    """All that the token moved. Raises BadAnswer for logs that the token cannot have written."""
    return tuple(
        _moved(ordinal, log)
        for ordinal, log in enumerate(receipt.logs)
        if log.address == token and log.topics[:1] == (TRANSFER_TOPIC,)
    )


def is_deep_enough(
    block_number: int, units: int, config: ChainRules, heads: Heads, day_units: int = 0
) -> bool:
    """Whether a transfer of units in this block may be credited.

    day_units: what the account was credited already within a day at the safe head.
    """
    if not config.by_tags:
        return heads.latest - block_number + 1 >= config.confirmations
    is_small = units <= config.safe_units_max
    is_small = is_small and units + day_units <= config.safe_units_per_day_max
    heads_of_use = (heads.safe, heads.finalized) if is_small else (heads.finalized,)
    return any(
        # A node that calls its newest block safe has no notion of safe.
        head is not None and block_number <= head < heads.latest
        for head in heads_of_use
    )


def _is_sealed(receipt: Receipt, block: Block | None) -> bool:
    """Some nodes answer receipts of blocks that are not built to the end, or no more there."""
    here = (receipt.block_number, receipt.block_hash)
    return block is not None and (block.number, block.hash) == here


def _moved(ordinal: int, log: Log) -> Moved:
    if log.removed or len(log.topics) != 3 or not _is_word(log.data):
        raise BadAnswer("no transfer of the token")
    return Moved(
        ordinal=ordinal,
        sender=_address(log.topics[1]),
        to=_address(log.topics[2]),
        units=int(log.data, 16),
    )


def _is_word(data: str) -> bool:
    return bool(_HASH.fullmatch(data))


def _address(topic: str) -> str:
    found = _ADDRESS_TOPIC.fullmatch(topic)
    if found is None:
        raise BadAnswer("no address")
    return f"0x{found[1]}"


def _paid(moved: tuple[Moved, ...], treasury: str) -> tuple[Moved, ...]:
    """What is worth something and the treasury's."""
    paid = tuple(each for each in moved if each.to == treasury and each.units > 0)
    if any(each.units > UNITS_MAX for each in paid):
        raise BadAnswer("more than there is")
    return paid


def _finding(
    moved: Moved, receipt: Receipt, block: Block, config: ChainRules, heads: Heads
) -> Finding:
    transfer = Transfer(
        chain_id=config.chain_id,
        tx_hash=receipt.tx_hash,
        ordinal=moved.ordinal,
        sender=moved.sender,
        units=moved.units,
        block_number=block.number,
        block_hash=block.hash,
        block_time=block.time,
    )
    return Finding(
        transfer=transfer,
        suspense=_suspense(moved.sender, config),
        is_final=is_deep_enough(block.number, moved.units, config, heads),
    )


def _suspense(sender: str, config: ChainRules) -> Suspense | None:
    if sender == ZERO_ADDRESS:
        return Suspense.MINTED
    if sender == config.treasury:
        return Suspense.FROM_TREASURY
    return Suspense.FROM_SWEEP if sender in config.sweeps else None


def _why_nothing(moved: tuple[Moved, ...]) -> Code:
    # Anybody may write a zero transfer that names a victim: as if it were not there.
    worth = [each for each in moved if each.units > 0]
    return Code.RECIPIENT_MISMATCH if worth else Code.TOKEN_TRANSFER_NOT_FOUND
