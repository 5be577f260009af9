"""Transactions of the real token, and what is made of them."""

import pytest
from eth_utils.address import to_checksum_address

from billing.chain.quorum import Quorum
from billing.chain.transfer import predates, transfer_nanos
from billing.chain.verify import Code, Suspense
from tests.support import evm_code
from tests.support.evm import Node
from tests.support.pay import (
    BUNDLER,
    FINALIZED_AFTER,
    OTHER,
    PAYER,
    SAFE_AFTER,
    TREASURY,
    judge,
    only,
    open_quorum,
    paid,
)
from tests.support.rpcproxy import RpcProxy
from tests.support.usdc import UNITS, ZERO, Usdc, call

TRANSFER, FROM = "transfer(address,uint256)", "transferFrom(address,address,uint256)"


async def test_a_transfer_is_seen_at_once_and_final_at_the_safe_block(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    payer = chain.accounts()[PAYER]
    tx_hash = usdc.transfer(payer, TREASURY, 5 * UNITS + 1)

    seen = await judge(quorum, tx_hash)
    chain.mine(SAFE_AFTER)
    safe = await judge(quorum, tx_hash)

    assert seen.code is Code.INSUFFICIENT_CONFIRMATIONS
    assert not seen.is_terminal
    assert paid(seen) == [(payer, 5 * UNITS + 1, False)]
    assert (safe.code, safe.is_terminal) == (None, True)
    transfer = only(safe).transfer
    receipt = chain.receipt(tx_hash)
    assert (transfer.chain_id, transfer.tx_hash, transfer.ordinal) == (8453, tx_hash, 0)
    assert transfer.block_hash == receipt["blockHash"]
    assert transfer.block_number == int(receipt["blockNumber"], 16)
    assert transfer_nanos(transfer) == 5_000_001_000
    assert only(safe).suspense is None
    assert not predates(transfer, transfer.block_time)


async def test_a_large_transfer_waits_for_the_finalized_block(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    payer = chain.accounts()[PAYER]
    small = usdc.transfer(payer, TREASURY, 1000 * UNITS)
    large = usdc.transfer(payer, TREASURY, 1000 * UNITS + 1)

    chain.mine(SAFE_AFTER)
    assert (await judge(quorum, small)).code is None
    assert (await judge(quorum, large)).code is Code.INSUFFICIENT_CONFIRMATIONS
    chain.mine(FINALIZED_AFTER - SAFE_AFTER)
    assert (await judge(quorum, large)).code is None


async def test_without_tags_the_confirmations_are_counted(
    nodes: list[RpcProxy], usdc: Usdc, chain: Node
) -> None:
    tx_hash = usdc.transfer(chain.accounts()[PAYER], TREASURY, 1)

    async with open_quorum(nodes, finality="confirmations", confirmations=3) as quorum:
        chain.mine(1)
        assert (await judge(quorum, tx_hash)).code is Code.INSUFFICIENT_CONFIRMATIONS
        chain.mine(1)
        assert (await judge(quorum, tx_hash)).code is None


async def test_another_token_pays_nothing(quorum: Quorum, usdc: Usdc, chain: Node) -> None:
    other = Usdc(chain, "0x" + "0f" * 20).place()
    payer = chain.accounts()[PAYER]
    other.mint(payer, UNITS)
    tx_hash = other.transfer(payer, TREASURY, UNITS)
    assert other.balance(TREASURY) == UNITS

    early = await judge(quorum, tx_hash)
    chain.mine(SAFE_AFTER)
    late = await judge(quorum, tx_hash)

    assert (early.code, early.is_terminal) == (Code.TOKEN_TRANSFER_NOT_FOUND, False)
    assert (late.code, late.is_terminal) == (Code.TOKEN_TRANSFER_NOT_FOUND, True)
    assert late.findings == ()


async def test_a_transfer_to_somebody_else_pays_nothing(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    tx_hash = usdc.transfer(chain.accounts()[PAYER], chain.accounts()[OTHER], UNITS)

    found = await judge(quorum, tx_hash)

    assert (found.code, found.findings) == (Code.RECIPIENT_MISMATCH, ())


async def test_a_zero_transfer_that_names_a_victim_pays_nothing(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    victim, attacker = chain.accounts()[PAYER], chain.accounts()[OTHER]
    tx_hash = usdc.send(attacker, FROM, victim, TREASURY, 0)
    assert len(chain.receipt(tx_hash)["logs"]) == 1  # the token lets anybody do that

    found = await judge(quorum, tx_hash)

    assert (found.code, found.findings) == (Code.TOKEN_TRANSFER_NOT_FOUND, ())


async def test_minted_tokens_are_nobodys(quorum: Quorum, usdc: Usdc, chain: Node) -> None:
    tx_hash = usdc.mint(TREASURY, UNITS)
    chain.mine(SAFE_AFTER)

    finding = only(await judge(quorum, tx_hash))

    assert (finding.suspense, finding.transfer.sender) == (Suspense.MINTED, ZERO)
    assert finding.transfer.ordinal == 1  # the token's Mint event comes first


async def test_the_treasury_and_sweep_addresses_pay_nobody(
    nodes: list[RpcProxy], usdc: Usdc, chain: Node
) -> None:
    sweep = str(to_checksum_address(chain.accounts()[OTHER]))
    usdc.mint(sweep, UNITS)
    chain.ask("anvil_impersonateAccount", TREASURY)
    chain.ask("anvil_setBalance", TREASURY, hex(10**18))
    swept = usdc.transfer(sweep, TREASURY, UNITS)
    own = usdc.transfer(TREASURY, TREASURY, UNITS)

    async with open_quorum(nodes, sweep_addresses=(sweep,)) as quorum:
        assert only(await judge(quorum, swept)).suspense is Suspense.FROM_SWEEP
        assert only(await judge(quorum, own)).suspense is Suspense.FROM_TREASURY


async def test_each_transfer_of_a_bundle_is_its_own_senders(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    """As an entry point of smart wallets does: neither from nor to of the transaction matter."""
    payer, other, bundler = (chain.accounts()[at] for at in (PAYER, OTHER, BUNDLER))
    usdc.mint(other, 10 * UNITS)
    calls = [
        (usdc.address, call(FROM, payer, TREASURY, 3 * UNITS)),
        (usdc.address, call(FROM, payer, other, 1 * UNITS)),
        (usdc.address, call(FROM, other, TREASURY, 4 * UNITS)),
        (usdc.address, call(FROM, payer, TREASURY, 0)),
        (usdc.address, call(FROM, payer, TREASURY, 3 * UNITS)),
        (usdc.address, call(TRANSFER, TREASURY, 10**9 * UNITS)),  # fails, and changes nothing
    ]
    batch = chain.deploy(evm_code.batching(calls))
    for owner in (payer, other):
        usdc.send(owner, "approve(address,uint256)", batch, 100 * UNITS)
    tx_hash = chain.send(bundler, batch)

    found = await judge(quorum, tx_hash)

    assert paid(found) == [
        (payer, 3 * UNITS, False),
        (other, 4 * UNITS, False),
        (payer, 3 * UNITS, False),
    ]
    logs = chain.receipt(tx_hash)["logs"]
    for finding in found.findings:
        log = logs[finding.transfer.ordinal]
        assert int(log["data"], 16) == finding.transfer.units
    assert len({finding.transfer.ordinal for finding in found.findings}) == 3


async def test_an_authorized_transfer_is_the_owners_whoever_sent_it(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    payer, relayer = chain.accounts()[PAYER], chain.accounts()[BUNDLER]
    data = usdc.authorize(payer, TREASURY, 7 * UNITS, b"n" * 32)
    tx_hash = chain.send(relayer, usdc.address, data)
    again = chain.send(relayer, usdc.address, data)

    assert paid(await judge(quorum, tx_hash)) == [(payer, 7 * UNITS, False)]
    assert (await judge(quorum, again)).code is Code.TX_REVERTED


@pytest.mark.parametrize("why", ["blacklisted", "paused", "poor"])
async def test_a_reverted_transfer_pays_nothing(
    why: str, quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    payer, poor = chain.accounts()[PAYER], chain.accounts()[OTHER]
    if why == "blacklisted":
        usdc.own("blacklist(address)", payer)
    elif why == "paused":
        usdc.own("pause()")
    tx_hash = usdc.transfer(poor if why == "poor" else payer, TREASURY, UNITS)
    assert chain.receipt(tx_hash)["status"] == "0x0"

    early = await judge(quorum, tx_hash)
    chain.mine(SAFE_AFTER)
    late = await judge(quorum, tx_hash)

    # Until the block is safe the same transaction may still succeed in another one.
    assert (early.code, early.is_terminal) == (Code.TX_REVERTED, False)
    assert (late.code, late.is_terminal, late.findings) == (Code.TX_REVERTED, True, ())


async def test_a_transaction_that_is_reorged_away_is_not_found(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    tx_hash = usdc.transfer(chain.accounts()[PAYER], TREASURY, UNITS)
    chain.mine(2)
    assert (await judge(quorum, tx_hash)).findings

    chain.ask("anvil_reorg", 3, [])

    gone = await judge(quorum, tx_hash)
    assert (gone.code, gone.is_terminal, gone.findings) == (Code.TX_NOT_FOUND, False, ())


async def test_a_transaction_that_moves_to_another_block_keeps_its_key(
    quorum: Quorum, usdc: Usdc, chain: Node
) -> None:
    account = chain.accounts()[PAYER]
    raw = _signed(usdc, chain)
    tx_hash = chain.ask("eth_sendRawTransaction", raw)
    chain.mine(2)
    before = only(await judge(quorum, tx_hash)).transfer

    chain.ask("anvil_reorg", 3, [])
    usdc.transfer(account, chain.accounts()[OTHER], 1)
    chain.mine(1)
    assert chain.ask("eth_sendRawTransaction", raw) == tx_hash
    after = only(await judge(quorum, tx_hash)).transfer

    assert (after.tx_hash, after.ordinal, after.units) == (tx_hash, before.ordinal, before.units)
    assert after.block_hash != before.block_hash
    assert after.block_number == int(chain.receipt(tx_hash)["blockNumber"], 16)


def _signed(usdc: Usdc, chain: Node) -> str:
    """A transfer that can be sent again after it was forgotten."""
    sender = chain.accounts()[OTHER]
    usdc.mint(sender, UNITS)
    made = {
        "from": sender,
        "to": usdc.address,
        "data": "0x" + call(TRANSFER, TREASURY, UNITS).hex(),
        "gas": hex(200_000),
        "gasPrice": hex(10**11),
        "nonce": chain.ask("eth_getTransactionCount", sender, "latest"),
        "chainId": hex(8453),
    }
    return str(chain.ask("eth_signTransaction", made))
