"""Payments on a local chain, looked at as the product does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from eth_utils.address import to_checksum_address

from billing.chain.quorum import Quorum
from billing.chain.verify import Finding, Verdict, verdict
from config.load import load
from config.secret import Secret
from config.settings import Chain
from tests.support.rpcproxy import RpcProxy

Nodes = list[RpcProxy]
TREASURY = str(to_checksum_address("0x" + "7e" * 20))
PAYER, OTHER, BUNDLER = 0, 1, 2
# Of anvil: safe is 32 blocks behind the newest, finalized 64.
SAFE_AFTER, FINALIZED_AFTER = 33, 65


def chain_settings(nodes: Nodes, **overrides: object) -> Chain:
    values: dict[str, object] = {
        "chain.rpc_urls": Secret(",".join(node.url for node in nodes)),
        "chain.treasury": TREASURY,
        "chain.timeout_s": 5.0,
        "chain.requests_burst": 1000,
    }
    values |= {f"chain.{name}": value for name, value in overrides.items()}
    return load(None, {}, values).settings.chain


@asynccontextmanager
async def open_quorum(nodes: Nodes, **overrides: object) -> AsyncIterator[Quorum]:
    quorum = Quorum(chain_settings(nodes, **overrides))
    try:
        yield quorum
    finally:
        await quorum.close()


async def judge(quorum: Quorum, tx_hash: str) -> Verdict:
    seen = await quorum.look(tx_hash)
    return verdict(seen.receipt, seen.block, quorum.rules, seen.heads)


def paid(found: Verdict) -> list[tuple[str, int, bool]]:
    """Sender, units and whether it is final, of each finding."""
    return [(f.transfer.sender, f.transfer.units, f.is_final) for f in found.findings]


def only(found: Verdict) -> Finding:
    (finding,) = found.findings
    return finding
