"""What enough nodes agree on: one that lags, lies or is silent decides nothing.

Two views of a transaction are equal when block, status and the token's transfers are; the one with
the most witnesses counts, if it has enough and no other has as many.
Failure: TooFewNodes or NodesDisagree; both mean: ask again later.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, TypeVar

import msgspec

from billing.chain.errors import ChainError, ChainUnfit, NodeRefused, NodesDisagree, TooFewNodes
from billing.chain.rpc import Node, tls_context
from billing.chain.verify import TRANSFER_TOPIC, ChainRules, chain_rules
from billing.chain.wire import Block, FoundLog, Heads, Log, Receipt
from config.rules import rpc_urls
from config.secret import Secret
from config.settings import Chain

T = TypeVar("T")
log = logging.getLogger("billing.chain")
DECIMALS = 6
SAID_MAX = 600
# What a single node invents must not keep us from the rest.
RUMOURS_MAX = 100


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What the verdict on a transaction is given. Without a receipt: enough nodes know of none."""

    receipt: Receipt | None
    block: Block | None
    heads: Heads


class Scan(msgspec.Struct, frozen=True, kw_only=True):
    """What a search of these blocks found, both included."""

    first: int
    last: int
    tx_hashes: tuple[str, ...]
    """What enough nodes named, then what fewer did; each is to be looked at by itself."""
    is_complete: bool
    """False: something may be missing; search the same blocks again."""


class _View(msgspec.Struct, frozen=True):
    """A transaction as one node has it."""

    receipt: Receipt | None
    block: Block | None


class Quorum:
    """All nodes of the settings. Close it; counts has what operators should see."""

    def __init__(self, chain: Chain) -> None:
        urls = rpc_urls(chain)
        self.rules: ChainRules = chain_rules(chain)
        self.counts: Counter[str] = Counter()
        tls = tls_context()
        self._nodes = [
            Node(str(at), Secret(url), chain, self.counts, tls) for at, url in enumerate(urls, 1)
        ]
        self._needed = min(2, len(urls)) if chain.development else 2
        self._scan_blocks_max = chain.scan_blocks_max
        self._overlap = chain.scan_overlap_blocks
        if self._needed < 2:
            log.warning("chain.one_node", extra={"chain_id": chain.id})

    async def close(self) -> None:
        for node in self._nodes:
            await node.close()

    async def check(self) -> None:
        """Raises ChainUnfit when any node serves another chain or another token; TooFewNodes."""
        problems = await self._all(self._problem)
        said = tuple(problem for problem in problems.values() if problem)
        if said:
            raise ChainUnfit(said)
        self._require(len(problems))

    async def look(self, tx_hash: str) -> Evidence:
        """What is known of a transaction, by its canonical hash."""
        # Heads first: what they cover when the block is fetched after them cannot change any more.
        heads = await self.heads()
        views = await self._all(lambda node: _view(node, tx_hash))
        view = self._agreed(views, self._story, {"tx_hash": tx_hash})
        return Evidence(receipt=view.receipt, block=view.block, heads=heads)

    async def heads(self) -> Heads:
        """The highest blocks that enough nodes have reached."""
        found = await self._all(lambda node: node.heads(by_tags=self.rules.by_tags))
        self._require(len(found))
        each = [self._evident(name, heads) for name, heads in found.items()]
        latest = self._reached([heads.latest for heads in each])
        assert latest is not None
        return Heads(
            latest=latest,
            safe=self._reached([heads.safe for heads in each]),
            finalized=self._reached([heads.finalized for heads in each]),
        )

    async def balance_units(self, block_number: int) -> int:
        """What the treasury has after this block."""
        found = await self._balances(block_number)
        return self._agreed(found, lambda units: units, {"block_number": block_number})

    async def scan(self, cursor: int, head: int) -> Scan:
        """Search for transfers to the treasury from the cursor on: one range, up to head at most.

        cursor: the first block that was never searched; those just before it are searched again.
        """
        if head < cursor:
            return Scan(first=cursor, last=cursor - 1, tx_hashes=(), is_complete=True)
        first = max(cursor - self._overlap, 0)
        last = min(cursor + self._scan_blocks_max - 1, head)
        found = await self._all(lambda node: node.find_logs(self.rules, first, last))
        self._require(len(found))
        witnesses = Counter(each for logs in found.values() for each in logs)
        known = sorted(each for each, count in witnesses.items() if count >= self._needed)
        rumours = sorted(witnesses.keys() - set(known))[:RUMOURS_MAX]
        is_complete = await self._is_complete(found, len(witnesses), first, last)
        if not is_complete:
            self.counts["logs_incomplete"] += 1
            log.warning("chain.logs_incomplete", extra={"first": first, "last": last})
        hashes = tuple(dict.fromkeys(each.tx_hash for each in (*known, *rumours)))
        return Scan(first=first, last=last, tx_hashes=hashes, is_complete=is_complete)

    async def _is_complete(
        self, found: dict[str, tuple[FoundLog, ...]], union_size: int, first: int, last: int
    ) -> bool:
        """Whether enough nodes found the same, and no less than the balance has grown by."""
        place = {"first": first, "last": last}
        try:
            agreed = self._agreed(found, lambda logs: logs, place)
        except NodesDisagree:
            return False
        paid_units = sum(each.units for each in agreed)
        try:
            before = await self.balance_units(first - 1) if first else 0
            grown_units = await self.balance_units(last) - before
        except ChainError:
            # A node without old states: then all have to have found the same.
            self.counts["balance_unknown"] += 1
            return len(agreed) == union_size
        return grown_units <= paid_units

    async def _balances(self, block_number: int) -> dict[str, int]:
        token, treasury = self.rules.token, self.rules.treasury
        return await self._all(lambda node: node.balance_units(token, treasury, block_number))

    async def _problem(self, node: Node) -> str:
        """What is wrong with a node, for an operator; empty: nothing."""
        if (chain_id := await node.chain_id()) != self.rules.chain_id:
            return f"node {node.name} serves chain {chain_id}, not {self.rules.chain_id}"
        if not await node.has_code(self.rules.token):
            return f"node {node.name} has no contract at the token's address {self.rules.token}"
        try:
            decimals = await node.decimals(self.rules.token)
        except NodeRefused:
            return f"node {node.name} says that {self.rules.token} is no token"
        is_right = decimals == DECIMALS
        return "" if is_right else f"the token has {decimals} decimals, not {DECIMALS}"

    def _evident(self, name: str, heads: Heads) -> Heads:
        """Without the heads that prove nothing: a node that calls its newest block safe."""
        proven = {
            tag: number if number is not None and number < heads.latest else None
            for tag, number in (("safe", heads.safe), ("finalized", heads.finalized))
        }
        refused = [tag for tag, number in proven.items() if number != getattr(heads, tag)]
        if refused:
            self.counts["heads_refused"] += 1
            log.warning("chain.heads_refused", extra={"node": name, "heads": refused})
        return Heads(latest=heads.latest, **proven)

    def _reached(self, numbers: Sequence[int | None]) -> int | None:
        known = sorted((number for number in numbers if number is not None), reverse=True)
        return known[self._needed - 1] if len(known) >= self._needed else None

    def _story(self, view: _View) -> Hashable:
        """What views of a transaction have to have in common."""
        if view.receipt is None or view.block is None:
            return None
        logs = tuple(
            (ordinal, *msgspec.structs.astuple(each))
            for ordinal, each in enumerate(view.receipt.logs)
            if self._is_transfer(each)
        )
        receipt, block = view.receipt, view.block
        return (receipt.block_hash, receipt.block_number, receipt.status, block, logs)

    def _is_transfer(self, each: Log) -> bool:
        return each.address == self.rules.token and each.topics[:1] == (TRANSFER_TOPIC,)

    def _agreed(
        self, found: dict[str, T], story: Callable[[T], Hashable], about: dict[str, Any]
    ) -> T:
        """What the most nodes say. Raises TooFewNodes, NodesDisagree.

        The story None is that of a node which knows of nothing: it may just be late.
        """
        self._require(len(found))
        camps: dict[Hashable, list[str]] = {}
        for name, each in found.items():
            camps.setdefault(story(each), []).append(name)
        if len(camps.keys() - {None}) > 1:
            self.counts["nodes_disagreed"] += 1
            said = [f"{names}: {said!r}"[:SAID_MAX] for said, names in camps.items()]
            log.warning("chain.nodes_disagree", extra={**about, "said": said})
        largest, *others = sorted(camps.values(), key=len, reverse=True)
        if len(largest) < self._needed or any(len(camp) == len(largest) for camp in others):
            raise NodesDisagree
        return found[largest[0]]

    def _require(self, answered: int) -> None:
        if answered < self._needed:
            self.counts["too_few_nodes"] += 1
            raise TooFewNodes

    async def _all(self, ask: Callable[[Node], Coroutine[Any, Any, T]]) -> dict[str, T]:
        """The answers of the nodes that had one, by their names."""
        found: dict[str, T] = {}
        await asyncio.gather(*(_ask(node, ask, found) for node in self._nodes))
        # By the order of the settings, whoever was first to answer.
        return {node.name: found[node.name] for node in self._nodes if node.name in found}


async def _ask(
    node: Node, ask: Callable[[Node], Coroutine[Any, Any, T]], found: dict[str, T]
) -> None:
    try:
        found[node.name] = await ask(node)
    except ChainError:
        return  # logged and counted where it happened


async def _view(node: Node, tx_hash: str) -> _View:
    """A receipt whose block is not the one at its number is none: it is not sealed, or no more."""
    receipt = await node.find_receipt(tx_hash)
    if receipt is None:
        return _View(None, None)
    block = await node.find_block(receipt.block_number)
    if block is None or block.hash != receipt.block_hash:
        return _View(None, None)
    return _View(receipt, block)
