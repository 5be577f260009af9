"""Searching blocks for transfers: what a node does not show is not taken for nothing."""

from typing import Any

import pytest

from billing.chain.errors import ChainError, TooFewNodes
from billing.chain.quorum import Quorum, Scan
from tests.support.evm import Node
from tests.support.pay import OTHER, PAYER, TREASURY, Nodes, open_quorum
from tests.support.rpcproxy import Alter, RpcError
from tests.support.usdc import UNITS, Usdc

LOGS, CALL = "eth_getLogs", "eth_call"


def no_logs(method: str, _: list[Any], result: Any) -> Any:
    return [] if method == LOGS else result


def pruned(method: str, _: list[Any], result: Any) -> Any:
    """A node without old states."""
    if method == CALL:
        raise RpcError(-32000)
    return result


def both(first: Alter, second: Alter) -> Alter:
    return lambda method, params, result: second(method, params, first(method, params, result))


@pytest.fixture
def cursor(chain: Node) -> int:
    """A block that was never searched; those that are searched again have nothing."""
    chain.mine(100)
    return chain.height() + 1


@pytest.fixture
def payments(cursor: int, usdc: Usdc, chain: Node) -> list[str]:
    """Two of them, with others around."""
    payer, other = chain.accounts()[PAYER], chain.accounts()[OTHER]
    usdc.transfer(payer, other, UNITS)
    first = usdc.transfer(payer, TREASURY, 2 * UNITS)
    chain.mine(1)
    second = usdc.mint(TREASURY, 3 * UNITS)
    chain.mine(1)
    return [first, second]


async def scanned(quorum: Quorum, cursor: int, chain: Node) -> Scan:
    return await quorum.scan(cursor, chain.height())


async def test_every_transfer_to_the_treasury_is_found(
    quorum: Quorum, cursor: int, payments: list[str], chain: Node
) -> None:
    found = await scanned(quorum, cursor, chain)

    assert list(found.tx_hashes) == payments
    assert (found.last, found.is_complete) == (chain.height(), True)
    assert await quorum.balance_units(cursor - 1) + 5 * UNITS == await quorum.balance_units(
        chain.height()
    )


@pytest.mark.parametrize("empty", [1, 2, 3])
async def test_an_empty_answer_is_no_evidence(
    empty: int, quorum: Quorum, nodes: Nodes, cursor: int, payments: list[str], chain: Node
) -> None:
    for node in nodes[:empty]:
        node.alter = no_logs

    found = await scanned(quorum, cursor, chain)

    assert list(found.tx_hashes) == ([] if empty == 3 else payments)
    # By the majority, but never against what the balance grew by.
    assert found.is_complete is (empty == 1)
    assert quorum.counts["logs_incomplete"] == (empty > 1)
    for node in nodes:
        node.honest()
    assert (await scanned(quorum, cursor, chain)).is_complete


@pytest.mark.parametrize("empty", [0, 1, 2])
async def test_without_old_states_all_nodes_have_to_find_the_same(
    empty: int, quorum: Quorum, nodes: Nodes, cursor: int, payments: list[str], chain: Node
) -> None:
    for at, node in enumerate(nodes):
        node.alter = both(no_logs, pruned) if at < empty else pruned

    found = await scanned(quorum, cursor, chain)

    assert list(found.tx_hashes) == payments
    # Two of three that show nothing may as well be the ones that are right.
    assert found.is_complete is (empty < 2)


async def test_money_that_went_out_again_hides_no_transfer(
    quorum: Quorum, cursor: int, payments: list[str], usdc: Usdc, chain: Node
) -> None:
    chain.ask("anvil_impersonateAccount", TREASURY)
    chain.ask("anvil_setBalance", TREASURY, hex(10**18))
    usdc.transfer(TREASURY, chain.accounts()[PAYER], 5 * UNITS)

    found = await scanned(quorum, cursor, chain)

    assert (list(found.tx_hashes), found.is_complete) == (payments, True)


async def test_ranges_follow_each_other_and_overlap(
    nodes: Nodes, cursor: int, payments: list[str], chain: Node
) -> None:
    head = chain.height()
    async with open_quorum(nodes, scan_blocks_max=2, scan_overlap_blocks=1) as quorum:
        at = cursor
        ranges: list[tuple[int, int]] = []
        hashes: list[str] = []
        while at <= head:
            found = await quorum.scan(at, head)
            assert found.is_complete
            ranges.append((found.first - cursor, found.last - cursor))
            hashes += found.tx_hashes
            at = found.last + 1
        nothing = await quorum.scan(at, head)
        ahead = await quorum.scan(at + 50, head)

    assert ranges == [(-1, 1), (1, 3), (3, 4)]
    assert list(dict.fromkeys(hashes)) == payments
    assert (nothing.last, nothing.tx_hashes, nothing.is_complete) == (head, (), True)
    assert (ahead.last, ahead.tx_hashes, ahead.is_complete) == (at + 49, (), True)


async def test_logs_that_were_not_asked_for_are_no_answer(
    quorum: Quorum, nodes: Nodes, cursor: int, payments: list[str], chain: Node
) -> None:
    def elsewhere(method: str, _: list[Any], result: Any) -> Any:
        return [log | {"blockNumber": "0x7fffffff"} for log in result] if method == LOGS else result

    nodes[0].alter = elsewhere
    assert list((await scanned(quorum, cursor, chain)).tx_hashes) == payments
    nodes[1].alter = elsewhere
    with pytest.raises(TooFewNodes):
        await scanned(quorum, cursor, chain)


async def test_what_one_node_invents_comes_last_and_is_bounded(
    quorum: Quorum, nodes: Nodes, cursor: int, payments: list[str], chain: Node
) -> None:
    def invent(method: str, _: list[Any], result: Any) -> Any:
        if method != LOGS:
            return result
        fakes = [result[0] | {"transactionHash": f"0x{n:064x}"} for n in range(1000)]
        return [*fakes, *result]

    nodes[0].alter = invent
    found = await scanned(quorum, cursor, chain)

    assert (list(found.tx_hashes[:2]), found.is_complete) == (payments, True)
    assert len(found.tx_hashes) == 102


async def test_a_balance_that_one_node_invents_is_not_believed(
    quorum: Quorum, nodes: Nodes, cursor: int, payments: list[str], chain: Node
) -> None:
    def rich(method: str, _: list[Any], result: Any) -> Any:
        return "0x" + "f" * 64 if method == CALL else result

    true_units = await quorum.balance_units(chain.height())
    nodes[0].alter = rich
    assert await quorum.balance_units(chain.height()) == true_units
    nodes[1].alter = pruned
    with pytest.raises(ChainError):
        await quorum.balance_units(chain.height())
