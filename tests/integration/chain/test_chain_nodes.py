"""Nodes that lag, lie, limit, hang or answer nonsense: payments wait or come in, nothing else."""

import logging
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from billing.chain.errors import ChainError, ChainUnfit, NodesDisagree, TooFewNodes
from billing.chain.quorum import Quorum
from billing.chain.verify import Code
from config.address import checksum_address
from tests.support.evm import Node
from tests.support.pay import PAYER, TREASURY, Nodes, judge, open_quorum, paid
from tests.support.rpcproxy import RpcError, running_proxy
from tests.support.usdc import OWNER, UNITS, Usdc

RECEIPT, BLOCK = "eth_getTransactionReceipt", "eth_getBlockByNumber"


def altering(method: str, change: Callable[[Any], Any]) -> Callable[[str, list[Any], Any], Any]:
    """Only this method's results are changed, in a copy."""

    def alter(asked: str, _: list[Any], result: Any) -> Any:
        return change(deepcopy(result)) if asked == method else result

    return alter


def in_log(**fields: object) -> Callable[[Any], Any]:
    def change(receipt: Any) -> Any:
        receipt["logs"][0] |= fields
        return receipt

    return change


def with_fields(**fields: object) -> Callable[[Any], Any]:
    return lambda result: result | fields


def shifted(receipt: Any) -> Any:
    """With a log of somebody else before it: another ordinal, so another credit."""
    (log,) = receipt["logs"]
    other = log | {"address": "0x" + "66" * 20}
    return receipt | {"logs": [other, log | {"logIndex": hex(int(log["logIndex"], 16) + 1)}]}


LIES: dict[str, Callable[[Any], Any]] = {
    "more": in_log(data="0x" + "f" * 64),
    "another sender": lambda r: in_log(
        topics=[r["logs"][0]["topics"][0], "0x" + "0" * 24 + "66" * 20, r["logs"][0]["topics"][2]]
    )(r),
    "reverted": with_fields(status="0x0"),
    "shifted": shifted,
    "no logs": with_fields(logs=[]),
    "removed": in_log(removed=True),
    "nothing": lambda _: None,
    "a string": lambda _: "0x",
    "another transaction": with_fields(transactionHash="0x" + "ab" * 32),
    "no status": lambda r: {k: v for k, v in r.items() if k != "status"},
    "twice": lambda r: r | {"logs": r["logs"] * 2},
}


@pytest.mark.parametrize("lie", LIES)
async def test_one_liar_of_three_changes_nothing(
    lie: str, quorum: Quorum, nodes: Nodes, tx_hash: str, chain: Node
) -> None:
    nodes[0].alter = altering(RECEIPT, LIES[lie])

    found = await judge(quorum, tx_hash)

    assert (found.code, paid(found)) == (None, [(chain.accounts()[PAYER], 5 * UNITS, True)])


@pytest.mark.parametrize("lie", LIES)
async def test_one_liar_of_two_makes_it_wait(lie: str, nodes: Nodes, tx_hash: str) -> None:
    nodes[0].alter = altering(RECEIPT, LIES[lie])

    async with open_quorum(nodes[:2]) as quorum:
        with pytest.raises((NodesDisagree, TooFewNodes)):
            await judge(quorum, tx_hash)
        nodes[0].honest()
        assert (await judge(quorum, tx_hash)).code is None


async def test_a_lie_is_counted_and_both_stories_are_logged_without_secrets(
    quorum: Quorum, nodes: Nodes, tx_hash: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodes[2].alter = altering(RECEIPT, LIES["another sender"])

    with caplog.at_level(logging.DEBUG):
        await judge(quorum, tx_hash)

    assert quorum.counts["nodes_disagreed"] == 1
    (record,) = [r for r in caplog.records if r.message == "chain.nodes_disagree"]
    said = " ".join(vars(record)["said"])
    assert "['1', '2']: " in said
    assert "['3']: " in said
    assert "66" * 20 in said
    assert not [r for r in caplog.records if "secret-of-this-node" in repr(vars(r))]


async def test_a_node_that_lags_makes_it_wait_and_not_fail(
    quorum: Quorum, nodes: Nodes, tx_hash: str
) -> None:
    nodes[0].alter = nodes[1].alter = altering(RECEIPT, LIES["nothing"])
    late = await judge(quorum, tx_hash)
    nodes[1].honest()
    found = await judge(quorum, tx_hash)

    assert (late.code, late.is_terminal) == (Code.TX_NOT_FOUND, False)
    assert (found.code, found.is_terminal) == (None, True)
    assert quorum.counts["nodes_disagreed"] == 0


async def test_a_receipt_of_a_block_that_is_not_sealed_is_none(
    quorum: Quorum, nodes: Nodes, tx_hash: str
) -> None:
    def unsealed(receipt: Any) -> Any:
        receipt["blockHash"] = "0x" + "0" * 64
        for log in receipt["logs"]:
            log["blockHash"] = receipt["blockHash"]
        return receipt

    for node in nodes:
        node.alter = altering(RECEIPT, unsealed)

    assert (await judge(quorum, tx_hash)).code is Code.TX_NOT_FOUND
    assert (await quorum.look(tx_hash)).receipt is None


async def test_safe_that_is_the_newest_block_is_no_evidence(
    quorum: Quorum, nodes: Nodes, usdc: Usdc, chain: Node, caplog: pytest.LogCaptureFixture
) -> None:
    tx_hash = usdc.transfer(chain.accounts()[PAYER], TREASURY, UNITS)
    chain.mine(2)
    newest = chain.ask(BLOCK, "latest", False)

    def alter(method: str, params: list[Any], result: Any) -> Any:
        is_tag = method == BLOCK and params[0] in ("safe", "finalized")
        return newest if is_tag else result

    for node in nodes[:2]:
        node.alter = alter
    found = await judge(quorum, tx_hash)

    assert (found.code, found.is_terminal) == (Code.INSUFFICIENT_CONFIRMATIONS, False)
    assert quorum.counts["heads_refused"] == 2
    assert "chain.heads_refused" in caplog.messages


async def test_one_node_that_is_ahead_makes_nothing_final(
    quorum: Quorum, nodes: Nodes, usdc: Usdc, chain: Node
) -> None:
    tx_hash = usdc.transfer(chain.accounts()[PAYER], TREASURY, UNITS)

    def ahead(method: str, params: list[Any], result: Any) -> Any:
        is_tag = method == BLOCK and not params[0].startswith("0x")
        far = hex(10**9 + (params[0] == "latest"))
        return result | {"number": far} if is_tag else result

    nodes[0].alter = ahead

    assert (await judge(quorum, tx_hash)).code is Code.INSUFFICIENT_CONFIRMATIONS
    assert (await quorum.heads()).latest == chain.height()


async def test_a_chain_without_these_tags_credits_nothing_by_them(
    quorum: Quorum, nodes: Nodes, tx_hash: str
) -> None:
    def untagged(method: str, params: list[Any], result: Any) -> Any:
        if method == BLOCK and params[0] in ("safe", "finalized"):
            raise RpcError(-32602)
        return result

    for node in nodes:
        node.alter = untagged

    assert (await judge(quorum, tx_hash)).code is Code.INSUFFICIENT_CONFIRMATIONS


@pytest.mark.parametrize("how", ["status", "code"])
async def test_a_node_that_limits_us_rests_and_the_others_decide(
    how: str, nodes: Nodes, tx_hash: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_quorum(nodes, rest_s=1.0) as quorum:
        if how == "status":
            nodes[0].raw = (429, b"slow down", {"retry-after": "1"})
        else:
            nodes[0].alter = _limiting

        assert (await judge(quorum, tx_hash)).code is None
        asked = len(nodes[0].asked)
        assert (await judge(quorum, tx_hash)).code is None
        assert (asked, len(nodes[0].asked)) == (1, 1)
        assert "chain.node_rests" in caplog.messages

        if how == "code":
            return
        nodes[0].honest()
        due = time.monotonic() + 5
        while len(nodes[0].asked) < 4:
            assert (await judge(quorum, tx_hash)).code is None
            assert time.monotonic() < due, "the node is never asked again"


def _limiting(*_: Any) -> Any:
    raise RpcError(-32005)


async def test_with_every_node_limiting_us_it_waits(
    quorum: Quorum, nodes: Nodes, tx_hash: str
) -> None:
    for node in nodes:
        node.raw = (429, b"", {})

    with pytest.raises(TooFewNodes):
        await judge(quorum, tx_hash)
    assert quorum.counts["too_few_nodes"] == 1


@pytest.mark.parametrize(
    "raw",
    [
        (500, b"{}", {}),
        (200, b"", {}),
        (200, b"<html>", {}),
        (200, b'{"jsonrpc":"2.0","id":1}', {}),
        (200, b"[" * 100_000, {}),
        (200, b"\x1f\x8b", {"content-encoding": "gzip"}),
    ],
    ids=["500", "empty", "html", "no result", "deep", "compressed"],
)
async def test_what_cannot_be_read_is_no_answer(
    raw: tuple[int, bytes, dict[str, str]], nodes: Nodes, tx_hash: str
) -> None:
    async with open_quorum(nodes) as quorum:
        nodes[0].raw = raw
        assert (await judge(quorum, tx_hash)).code is None
        nodes[1].raw = raw
        with pytest.raises(ChainError):
            await judge(quorum, tx_hash)


async def test_an_answer_to_another_question_is_none(
    quorum: Quorum, nodes: Nodes, tx_hash: str
) -> None:
    nodes[0].is_other_id = True
    assert (await judge(quorum, tx_hash)).code is None
    nodes[1].is_other_id = True
    with pytest.raises(TooFewNodes):
        await judge(quorum, tx_hash)


async def test_more_than_is_read_of_any_answer_is_none(nodes: Nodes, tx_hash: str) -> None:
    for node in nodes[:2]:
        node.alter = altering(RECEIPT, with_fields(padding="0" * 100_000))

    async with open_quorum(nodes, answer_bytes_max=120_000) as quorum:
        assert (await judge(quorum, tx_hash)).code is None
    async with open_quorum(nodes, answer_bytes_max=100_000) as quorum:
        with pytest.raises(TooFewNodes):
            await judge(quorum, tx_hash)


async def test_two_against_two_is_a_tie(nodes: Nodes, tx_hash: str, chain: Node) -> None:
    for node in nodes[:2]:
        node.alter = altering(RECEIPT, LIES["more"])

    with running_proxy(chain.url) as fourth:
        async with open_quorum([*nodes, fourth]) as quorum:
            with pytest.raises(NodesDisagree):
                await judge(quorum, tx_hash)


async def test_a_node_that_hangs_keeps_nobody_waiting_and_rests_after_some_tries(
    nodes: Nodes, tx_hash: str
) -> None:
    nodes[0].hang = threading.Event()
    async with open_quorum(nodes, timeout_s=0.15, failures_max=2) as quorum:
        began = time.monotonic()
        assert (await judge(quorum, tx_hash)).code is None
        assert time.monotonic() - began < 3
        assert (await judge(quorum, tx_hash)).code is None

    assert len(nodes[0].asked) == 2  # one for its heads and one for the receipt, then it rests
    nodes[0].hang.set()


async def test_no_redirect_is_followed_and_no_proxy_used(
    nodes: Nodes, tx_hash: str, chain: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with running_proxy(chain.url) as elsewhere:
        nodes[0].raw = (307, b"", {"location": elsewhere.url})
        async with open_quorum(nodes) as quorum:
            assert (await judge(quorum, tx_hash)).code is None

    assert elsewhere.asked == []
    assert nodes[0].asked


async def test_questions_are_rationed(nodes: Nodes, tx_hash: str) -> None:
    async with open_quorum(nodes, requests_per_second=1, requests_burst=5, timeout_s=0.2) as quorum:
        assert (await judge(quorum, tx_hash)).code is None  # three heads, receipt, block
        with pytest.raises(TooFewNodes):
            await judge(quorum, tx_hash)

        assert [len(node.asked) for node in nodes] == [5, 5, 5]
        assert quorum.counts["node_rationed"] == 3


async def test_one_node_is_enough_for_development_with_a_warning(
    nodes: Nodes, tx_hash: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_quorum(nodes[:1], development=True) as quorum:
        assert (await judge(quorum, tx_hash)).code is None

    assert "chain.one_node" in caplog.messages


async def test_nodes_of_the_right_chain_and_token_are_fit(quorum: Quorum, nodes: Nodes) -> None:
    await quorum.check()

    nodes[0].raw = (500, b"", {})
    await quorum.check()
    nodes[1].raw = (500, b"", {})
    with pytest.raises(TooFewNodes):
        await quorum.check()


@pytest.mark.parametrize(
    ("method", "result", "said"),
    [
        ("eth_chainId", "0x1", "node 2 serves chain 1, not 8453"),
        ("eth_getCode", "0x", "node 2 has no contract at the token's address"),
        ("eth_call", "0x" + "12".rjust(64, "0"), "the token has 18 decimals, not 6"),
    ],
)
async def test_another_chain_or_token_is_refused_at_start(
    method: str, result: str, said: str, quorum: Quorum, nodes: Nodes
) -> None:
    nodes[1].alter = altering(method, lambda _: result)

    with pytest.raises(ChainUnfit) as caught:
        await quorum.check()

    (problem,) = caught.value.problems
    assert problem.startswith(said)


async def test_a_contract_that_is_no_token_is_refused_at_start(nodes: Nodes, chain: Node) -> None:
    chain.ask("anvil_setCode", OWNER, "0xfe")

    async with open_quorum(nodes, token=checksum_address(OWNER)) as quorum:
        with pytest.raises(ChainUnfit) as caught:
            await quorum.check()

    assert len(caught.value.problems) == 3
    assert all("is no token" in problem for problem in caught.value.problems)
