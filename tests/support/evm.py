"""A local EVM node: anvil, of the package that its makers publish for npm, checked and kept.

ANVIL_BIN names another binary. Failure: without npm or its registry, what needs a chain fails.
"""

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from eth_utils.address import to_checksum_address

from gateway.supervisor import listen
from tests.support.evm_code import creation
from tests.support.npm import packed_files

VERSION = "1.7.1"
# Package, and the SHA-256 of what npm packs of it.
PACKAGES = {
    ("Linux", "x86_64"): (
        "@foundry-rs/anvil-linux-amd64",
        "5727dd8f08f3bf6dde4ec1d9832e87c43f9315ef824bff1ab18486bf51bc7af3",
    ),
    ("Linux", "aarch64"): (
        "@foundry-rs/anvil-linux-arm64",
        "51c5290104d51295acb4733dbe32f104d600f2e170c4f00f173e8808a37168c4",
    ),
    ("Darwin", "arm64"): (
        "@foundry-rs/anvil-darwin-arm64",
        "c637a832c474ecf0ca12179b4f852ef7561880a4b9f6ca59ad1f4929186204e6",
    ),
}
CHAIN_ID = 8453
START_WITHIN_S, STOP_WITHIN_S = 20, 5


class Node:
    """A running node and what tests ask of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=10)
        self._ids = count(1)

    def ask(self, method: str, *params: Any) -> Any:
        """A call's result."""
        request = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
        answer = self._client.post("", json=request).json()
        assert "error" not in answer, answer
        return answer["result"]

    def send(self, sender: str, to: str, data: bytes = b"") -> str:
        """The hash of a transaction of an account that the node has the key of, or plays."""
        made = {"from": sender, "to": to, "data": "0x" + data.hex(), "gas": hex(2_000_000)}
        return str(self.ask("eth_sendTransaction", made))

    def mine(self, blocks: int) -> None:
        self.ask("anvil_mine", hex(blocks))

    def height(self) -> int:
        return int(self.ask("eth_blockNumber"), 16)

    def accounts(self) -> list[str]:
        return [account.lower() for account in self.ask("eth_accounts")]

    def deploy(self, runtime: bytes) -> str:
        """The address of a new contract with this code."""
        sender = self.ask("eth_accounts")[0]
        made = {"from": sender, "data": "0x" + creation(runtime).hex(), "gas": hex(5_000_000)}
        receipt_id = self.ask("eth_sendTransaction", made)
        receipt = self.receipt(receipt_id)
        assert int(receipt["status"], 16) == 1
        return str(to_checksum_address(receipt["contractAddress"]))

    def receipt(self, transaction: str) -> dict[str, Any]:
        """Of a transaction, as soon as it is in a block."""
        due = time.monotonic() + START_WITHIN_S
        while time.monotonic() < due:
            found: dict[str, Any] | None = self.ask("eth_getTransactionReceipt", transaction)
            if found is not None:
                return found
            time.sleep(0.01)
        raise AssertionError("the transaction is in no block")

    def code(self, address: str) -> str:
        return str(self.ask("eth_getCode", address, "latest"))

    def close(self) -> None:
        self._client.close()


@contextmanager
def running_anvil() -> Iterator[Node]:
    """A fresh chain on a free port of 127.0.0.1."""
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    command = [str(anvil_binary()), "--port", str(port), "--chain-id", str(CHAIN_ID), "--silent"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    node = Node(f"http://127.0.0.1:{port}")
    try:
        _wait_until_up(node, process)
        yield node
    finally:
        node.close()
        process.terminate()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(node: Node, process: "subprocess.Popen[bytes]") -> None:
    due = time.monotonic() + START_WITHIN_S
    while True:
        try:
            assert int(node.ask("eth_chainId"), 16) == CHAIN_ID
            return
        except httpx.TransportError:
            assert process.poll() is None, "anvil ended"
            assert time.monotonic() < due, "anvil does not answer"
            time.sleep(0.02)


def anvil_binary() -> Path:
    """Where anvil is, fetched when it is not there yet."""
    named = os.environ.get("ANVIL_BIN")
    if named:
        return Path(named)
    package, digest = PACKAGES[platform.system(), platform.machine()]
    members = {"bin/anvil": f"anvil-{VERSION}"}
    (binary,) = packed_files(f"{package}@{VERSION}", digest, members, mode=0o755)
    return binary
