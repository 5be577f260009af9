"""Addresses of Ethereum in their checksum form. Pure."""

import re

# Not the standard library's SHA-3, whose padding differs. This one costs 20 ms and 1.5 MB to
# import; that of the chain's library, with all it brings, a second and 60 MB.
from Crypto.Hash import keccak

ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


def checksum_address(address: str) -> str:
    """The address as EIP-55 writes it: https://eips.ethereum.org/EIPS/eip-55"""
    digits = address[2:].lower()
    nibbles = keccak.new(data=digits.encode(), digest_bits=256).hexdigest()
    pairs = zip(digits, nibbles, strict=False)
    return "0x" + "".join(d.upper() if int(nibble, 16) >= 8 else d for d, nibble in pairs)


def is_checksummed(address: str) -> bool:
    return bool(ADDRESS.fullmatch(address)) and address == checksum_address(address)
