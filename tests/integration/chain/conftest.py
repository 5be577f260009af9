"""A chain with the real USDC on it, and three nodes of it that can be made to misbehave."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from billing.chain.quorum import Quorum
from tests.support.evm import Node, running_anvil
from tests.support.pay import FINALIZED_AFTER, PAYER, TREASURY, Nodes, open_quorum
from tests.support.rpcproxy import RpcProxy, running_proxy
from tests.support.usdc import UNITS, Usdc


@pytest.fixture(scope="session")
def usdc_chain() -> Iterator[Node]:
    with running_anvil() as node:
        usdc = Usdc(node).place()
        usdc.mint(node.accounts()[PAYER], 100_000 * UNITS)
        node.mine(FINALIZED_AFTER)
        yield node


@pytest.fixture(scope="session")
def tx_hash(usdc_chain: Node) -> str:
    """A payment of 5 USDC that is final."""
    made = Usdc(usdc_chain).transfer(usdc_chain.accounts()[PAYER], TREASURY, 5 * UNITS)
    usdc_chain.mine(FINALIZED_AFTER)
    return made


@pytest.fixture(scope="session")
def three_proxies(usdc_chain: Node) -> Iterator[list[RpcProxy]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running_proxy(usdc_chain.url)) for _ in range(3)]


@pytest.fixture
def chain(usdc_chain: Node) -> Iterator[Node]:
    """The chain as every test finds it."""
    before = usdc_chain.ask("evm_snapshot")
    yield usdc_chain
    assert usdc_chain.ask("evm_revert", before)


@pytest.fixture
def usdc(chain: Node) -> Usdc:
    return Usdc(chain)


@pytest.fixture
def nodes(chain: Node, three_proxies: list[RpcProxy]) -> Iterator[Nodes]:
    """Three honest nodes."""
    for proxy in three_proxies:
        proxy.honest()
        proxy.asked.clear()
        proxy.headers.clear()
    yield three_proxies
    for proxy in three_proxies:
        proxy.honest()


@pytest.fixture
async def quorum(nodes: Nodes) -> AsyncIterator[Quorum]:
    async with open_quorum(nodes) as quorum:
        yield quorum
