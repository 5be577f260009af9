"""The shape of a signature, judged before anything costs. Pure.

65 bytes are those of a key and must have their one form; more are those of a contract, which alone
knows what they mean.
"""

import re

from keys.errors import LoginRefused

EOA_BYTES = 65
# Of a wallet with passkeys that is deployed by the signature itself (EIP-6492) are about 2,000.
SIGNATURE_BYTES_MAX = 8192
# What is nearly as long as that of a key is a broken one (or EIP-2098, which nobody sends here).
CONTRACT_BYTES_MIN = 97
SUFFIX_6492 = "6492" * 16
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})+", re.ASCII)


def check_signature(text: str) -> str:
    """The signature in lower case. Raises LoginRefused."""
    if len(text) > 2 + 2 * SIGNATURE_BYTES_MAX:
        raise LoginRefused(f"The signature has more than {SIGNATURE_BYTES_MAX} bytes.")
    if not _HEX.fullmatch(text):
        raise LoginRefused("The signature is not written as 0x and hexadecimal digits.")
    signature = bytes.fromhex(text[2:])
    if len(signature) == EOA_BYTES:
        _check_eoa(signature)
    elif len(signature) < CONTRACT_BYTES_MIN:
        raise LoginRefused("The signature has neither the 65 bytes of a key nor a contract's form.")
    elif text.lower().endswith(SUFFIX_6492) and len(signature) % 32:
        raise LoginRefused("The signature is not wrapped as EIP-6492 has it.")
    return text.lower()


def is_of_key(signature: str) -> bool:
    """Whether it may be that of a key, so that no chain has to be asked at first."""
    return len(signature) == 2 + 2 * EOA_BYTES


def _check_eoa(signature: bytes) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    if not (0 < r < CURVE_ORDER and 0 < s < CURVE_ORDER):
        raise LoginRefused("The signature is out of range.")
    # Of the two that are valid for one message only one counts: https://eips.ethereum.org/EIPS/eip-2
    if s > CURVE_ORDER // 2:
        raise LoginRefused("The signature has a high s.")
    if signature[64] not in (27, 28):
        raise LoginRefused("The last byte of the signature is neither 27 nor 28.")
