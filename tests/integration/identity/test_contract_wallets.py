"""Wallets that are contracts, on a local chain: deployed ones, ones that are not yet, bad ones."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import msgspec
import pytest
from eth_utils.address import to_checksum_address

from config.secret import Secret
from keys.siwe_message import read_message
from keys.siwe_wire import Question
from tests.support import evm_code
from tests.support.evm import Node
from tests.support.gateway import Gateway, make_settings, running_gateway
from tests.support.upstream.launch import Upstream
from tests.support.wallets import KeyWallet, Visitor, visiting, write_message

SALT = b"\x07" * 32
LONG = "0x" + "ab" * 200
WITHIN_S = 8.0


class ContractWallet:
    """A contract that its owner's key signs for; before it is deployed, with how to deploy it."""

    def __init__(self, address: str, owner: KeyWallet, deploy: tuple[str, bytes] | None = None):
        self.address = address
        self.owner = owner
        self.deploy = deploy

    def sign(self, message: str) -> str:
        signature = self.owner.sign(message)
        if self.deploy is None:
            return signature
        return "0x" + evm_code.wrapped(*self.deploy, bytes.fromhex(signature[2:])).hex()


class Mute:
    """A contract with a signature that means nothing."""

    def __init__(self, address: str, signature: str = LONG) -> None:
        self.address = address
        self._signature = signature

    def sign(self, _: str) -> str:
        return self._signature


@pytest.fixture
async def chained(
    book_url: str, till_url: str, upstream: Upstream, anvil: Node
) -> AsyncIterator[Gateway]:
    """A gateway that asks the local chain."""
    settings = make_settings(
        upstream.base_url, chain__rpc_urls=Secret(anvil.url), till__call_timeout_ms=2000
    )
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        yield gateway


@pytest.fixture
async def visitor(chained: Gateway) -> AsyncIterator[Visitor]:
    async with visiting(chained) as visitor:
        yield visitor


def undeployed(node: Node, owner: KeyWallet) -> ContractWallet:
    """Where a factory will put the wallet, and the call that does it."""
    factory = node.deploy(evm_code.factory())
    code = evm_code.creation(evm_code.wallet(owner.address))
    address = to_checksum_address(evm_code.address_of(factory, SALT, code))
    return ContractWallet(address, owner, (factory, SALT + code))


async def test_contract_wallets_sign_in_deployed_or_not(visitor: Visitor, anvil: Node) -> None:
    owner = KeyWallet()
    deployed = ContractWallet(anvil.deploy(evm_code.wallet(owner.address)), owner)
    future = undeployed(anvil, owner)
    assert anvil.code(future.address) == "0x"

    for wallet in (deployed, future):
        entered = await visitor.sign_in(wallet)
        assert entered.status_code == 200, entered.text
        assert entered.json()["wallet_kind"] == "contract"
        assert entered.json()["expires_at"] - entered.json()["created_at"] == 3600
        assert (await visitor.session()).json()["wallet"] == wallet.address
    assert anvil.code(future.address) == "0x"  # asked about, not deployed


async def test_the_key_of_somebody_else_opens_no_contract(visitor: Visitor, anvil: Node) -> None:
    owner, thief = KeyWallet(), KeyWallet()
    deployed = anvil.deploy(evm_code.wallet(owner.address))
    future = undeployed(anvil, owner)
    other_code = undeployed(anvil, thief)

    wallets = (
        ContractWallet(deployed, thief),
        ContractWallet(future.address, thief, future.deploy),
        ContractWallet(future.address, thief, other_code.deploy),
        ContractWallet(owner.address, thief),
        ContractWallet(owner.address, thief, other_code.deploy),
    )
    for wallet in wallets:
        refused = await visitor.sign_in(wallet)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "login_refused")


async def test_odd_contracts_are_refused_in_time(visitor: Visitor, anvil: Node) -> None:
    magic = evm_code.MAGIC
    codes = {
        "says no": evm_code.saying(b"\xff" * 4 + bytes(28)),
        "says one": evm_code.saying(bytes(31) + b"\x01"),
        "says nothing": evm_code.saying(b""),
        "says too little": evm_code.saying(magic),
        "pads with garbage": evm_code.saying(magic + b"\x01" * 28),
        "puts the answer right": evm_code.saying(bytes(28) + magic),
        "reverts": evm_code.saying(b"", "REVERT"),
        "reverts with the answer": evm_code.saying(magic + bytes(28), "REVERT"),
        "is invalid": b"\xfe",
        "returns megabytes": evm_code.returning_megabytes(),
        "burns all gas": evm_code.burning(),
    }
    for name, code in codes.items():
        began = time.monotonic()
        refused = await visitor.sign_in(Mute(anvil.deploy(code)))

        # A megabyte is more than is read of any answer, as if the node had said nothing.
        assert refused.status_code in (401, 503), (name, refused.text)
        assert (await visitor.session()).status_code == 401
        assert time.monotonic() - began < WITHIN_S, name
    wallet = KeyWallet()
    assert (await visitor.sign_in(wallet)).status_code == 200


async def test_no_contract_makes_the_gateway_fetch_a_url(visitor: Visitor, anvil: Node) -> None:
    asked: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        code = evm_code.asking_elsewhere([f"http://127.0.0.1:{port}/{{sender}}/{{data}}.json"])
        refused = await visitor.sign_in(Mute(anvil.deploy(code)))

    assert (refused.status_code, asked) == (401, [])


@pytest.mark.parametrize("behaviour", ["silent", "away", "garbage", "drip", "wrong chain"])
async def test_a_node_that_misbehaves_lets_nobody_in_and_keeps_nobody_waiting(
    behaviour: str, book_url: str, till_url: str, upstream: Upstream
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        if behaviour == "silent":
            await reader.read()
        elif behaviour == "garbage":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{not json")
        elif behaviour == "drip":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n")
            while not reader.at_eof():
                writer.write(b" ")
                await asyncio.sleep(0.1)
        elif behaviour == "wrong chain":
            answer = msgspec.json.encode({"jsonrpc": "2.0", "id": 0, "result": "0x1"})
            head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(answer) + answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        if behaviour == "away":
            server.close()
        url = Secret(f"http://127.0.0.1:{port}")
        settings = make_settings(
            upstream.base_url,
            chain__rpc_urls=url,
            chain__timeout_s=0.5,
            till__call_timeout_ms=2000,
        )
        async with (
            running_gateway(book_url, till_url, upstream.base_url, settings) as gateway,
            visiting(gateway) as visitor,
            visiting(gateway) as other,
        ):
            assert (await other.sign_in(KeyWallet())).status_code == 200
            began = time.monotonic()
            contract = asyncio.ensure_future(visitor.sign_in(Mute("0x" + "1" * 40)))
            assert (await other.sign_in(KeyWallet())).status_code == 200
            refused = await contract

    assert refused.status_code == (401 if behaviour == "wrong chain" else 503), refused.text
    assert time.monotonic() - began < 3


async def test_wallets_that_wait_for_a_silent_node_end_no_sign_in_of_others(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    """Waiting for a thread came on top of waiting for the node: the verifier was killed for it."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = make_settings(
            upstream.base_url,
            chain__rpc_urls=Secret(f"http://127.0.0.1:{port}"),
            chain__timeout_s=30,
            identity__verify_timeout_s=2,
            till__call_timeout_ms=2000,
        )
        async with (
            running_gateway(book_url, till_url, upstream.base_url, settings) as gateway,
            visiting(gateway) as visitor,
        ):
            assert (await visitor.sign_in(KeyWallet())).status_code == 200
            helper = gateway.services.sign_in.helper
            pid = helper.pid
            said = {"nonce": "a" * 32, "uri": gateway.origin, "domain": gateway.origin[7:]}
            text = write_message("0x" + "1" * 40, said)
            question = Question(
                id=0,
                text=text,
                fields=read_message(text),
                signature=LONG,
                domain=said["domain"],
                scheme="http",
                nonce=said["nonce"],
                at=datetime.now(UTC),
            )
            asked = [asyncio.ensure_future(helper.verify(question)) for _ in range(24)]
            assert (await visitor.sign_in(KeyWallet())).status_code == 200
            verdicts = {answer.verdict for answer in await asyncio.gather(*asked)}

    assert verdicts == {"chain_away", "busy"}
    assert helper.pid == pid
