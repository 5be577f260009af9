"""What a worker and its verifying process say to each other: one JSON object a line. Pure."""

from datetime import datetime
from typing import Literal

import msgspec

from keys.siwe_message import SiweFields

Verdict = Literal["key", "contract", "refused", "no_chain", "chain_away", "busy", "crashed"]


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line: what holds for all questions."""

    rpc_urls: tuple[str, ...]
    timeout_s: float
    """For one question to the chain."""


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Did the address sign this message? Everything but the signature has been checked once."""

    id: int
    text: str
    """The message as it came: the parts must print back to it."""
    fields: SiweFields
    signature: str
    domain: str
    scheme: str
    nonce: str
    at: datetime


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One for each question, in no order; the first, of id 0, says that the process is ready."""

    id: int
    verdict: Verdict
    detail: str = ""
    """For the log: an error's class, nothing of what was sent."""
