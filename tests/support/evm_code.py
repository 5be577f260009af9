"""Contracts for tests, assembled from mnemonics: no compiler is needed to read what they do."""

from collections.abc import Sequence

from eth_abi.abi import encode
from eth_utils.crypto import keccak

MAGIC = bytes.fromhex("1626ba7e")  # of EIP-1271: the signature is valid
SUFFIX_6492 = bytes.fromhex("6492" * 16)
_PLAIN = {
    "STOP": 0x00,
    "SUB": 0x03,
    "MUL": 0x02,
    "EQ": 0x14,
    "SHL": 0x1B,
    "SHR": 0x1C,
    "CALLDATALOAD": 0x35,
    "CALLDATASIZE": 0x36,
    "CALLDATACOPY": 0x37,
    "CODECOPY": 0x39,
    "POP": 0x50,
    "MLOAD": 0x51,
    "MSTORE": 0x52,
    "JUMP": 0x56,
    "GAS": 0x5A,
    "JUMPDEST": 0x5B,
    "DUP1": 0x80,
    "SWAP1": 0x90,
    "CALL": 0xF1,
    "RETURN": 0xF3,
    "CREATE2": 0xF5,
    "STATICCALL": 0xFA,
    "REVERT": 0xFD,
}


def assemble(*words: str | int | bytes) -> bytes:
    """Machine code of mnemonics; a number or bytes are pushed."""
    code = b""
    for word in words:
        if isinstance(word, str):
            code += bytes([_PLAIN[word]])
        else:
            data = word if isinstance(word, bytes) else word.to_bytes(max(1, _size(word)), "big")
            code += bytes([0x5F + len(data)]) + data
    return code


def _size(number: int) -> int:
    return (number.bit_length() + 7) // 8


def creation(runtime: bytes) -> bytes:
    """Code that deploys the runtime: it copies what follows it to memory and returns that."""
    size = len(runtime).to_bytes(2, "big")
    head_bytes = len(assemble(size, "DUP1", 0, 0, "CODECOPY", 0, "RETURN"))
    return assemble(size, "DUP1", head_bytes, 0, "CODECOPY", 0, "RETURN") + runtime


def wallet(owner: str) -> bytes:
    """An EIP-1271 wallet: its owner's key signs for it.

    It puts hash, v, r and s of the arguments where the precompile at 1 wants them, recovers the
    signer, and returns the magic value times (signer == owner).
    """
    return assemble(
        *(0x04, "CALLDATALOAD", 0x00, "MSTORE"),
        *(0xA4, "CALLDATALOAD", 0xF8, "SHR", 0x20, "MSTORE"),
        *(0x64, "CALLDATALOAD", 0x40, "MSTORE"),
        *(0x84, "CALLDATALOAD", 0x60, "MSTORE"),
        *(0x20, 0x80, 0x80, 0x00, 0x01, "GAS", "STATICCALL", "POP"),
        *(0x80, "MLOAD", bytes.fromhex(owner[2:]), "EQ"),
        *(MAGIC, 0xE0, "SHL", "MUL", 0x00, "MSTORE", 0x20, 0x00, "RETURN"),
    )


def saying(answer: bytes, how: str = "RETURN") -> bytes:
    """A contract that answers these bytes, whatever it is asked; or reverts with them."""
    size = len(answer).to_bytes(2, "big")
    head_bytes = len(assemble(size, 0, 0, "CODECOPY", size, 0, how))
    return assemble(size, head_bytes, 0, "CODECOPY", size, 0, how) + answer


def returning_megabytes() -> bytes:
    """A contract that returns a megabyte of zeros."""
    return assemble(1024 * 1024, 0, "RETURN")


def burning() -> bytes:
    """A contract that never ends by itself."""
    return assemble("JUMPDEST", 0, "JUMP")


def batching(calls: Sequence[tuple[str, bytes]]) -> bytes:
    """A contract that makes these calls, each (address, data), whenever it is called itself.

    What one of them answers, an error too, changes nothing for the others.
    """
    head = _batch_head(calls, 0)
    return _batch_head(calls, len(head)) + b"".join(data for _, data in calls)


def _batch_head(calls: Sequence[tuple[str, bytes]], data_at: int) -> bytes:
    words: list[str | int | bytes] = []
    for address, data in calls:
        size = len(data).to_bytes(2, "big")
        words += [size, data_at.to_bytes(2, "big"), 0, "CODECOPY"]
        words += [0, 0, size, 0, 0, bytes.fromhex(address[2:]), "GAS", "CALL", "POP"]
        data_at += len(data)
    return assemble(*words, "STOP")


def factory() -> bytes:
    """Deploys with CREATE2 what follows the first 32 bytes, its salt, of the call."""
    return assemble(
        *(0x20, "CALLDATASIZE", "SUB", "DUP1", 0x20, 0x00, "CALLDATACOPY"),
        *(0x00, "CALLDATALOAD", "SWAP1", 0x00, 0x00, "CREATE2"),
        *(0x00, "MSTORE", 0x20, 0x00, "RETURN"),
    )


def address_of(factory_address: str, salt: bytes, init_code: bytes) -> bytes:
    """Where a CREATE2 factory deploys to: https://eips.ethereum.org/EIPS/eip-1014"""
    start = b"\xff" + bytes.fromhex(factory_address[2:]) + salt
    return keccak(start + keccak(init_code))[12:]


def wrapped(factory_address: str, call: bytes, signature: bytes) -> bytes:
    """A signature with how to deploy its wallet: https://eips.ethereum.org/EIPS/eip-6492"""
    types = ("address", "bytes", "bytes")
    return encode(types, (factory_address, call, signature)) + SUFFIX_6492


def asking_elsewhere(urls: Sequence[str]) -> bytes:
    """Reverts as EIP-3668 has it: fetch one of these URLs and come back."""
    selector = keccak(text="OffchainLookup(address,string[],bytes,bytes4,bytes)")[:4]
    types = ("address", "string[]", "bytes", "bytes4", "bytes")
    values = ("0x" + "11" * 20, list(urls), b"", MAGIC, b"")
    return saying(selector + encode(types, values), "REVERT")
