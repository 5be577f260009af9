"""Sign-in messages (EIP-4361), read from the bytes that came, before anything costs. Pure.

One anchored regular expression with a cap on every part: the library's grammar takes seconds for
two hostile kilobytes. What is read prints back to the very bytes received, or it is refused: nobody
signs one text and has another one judged.
https://eips.ethereum.org/EIPS/eip-4361
"""

import re
from datetime import datetime, timedelta
from typing import Any

import msgspec

from config.address import checksum_address
from keys.errors import LoginRefused

MESSAGE_BYTES_MAX = 4096
ISSUED_BEFORE_MAX = timedelta(minutes=5)
ISSUED_AFTER_MAX = timedelta(seconds=60)
LASTS_MAX = timedelta(minutes=10)
INTRODUCTION = " wants you to sign in with your Ethereum account:"

_TIME = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:Z|[+-][0-9]{2}:[0-9]{2})"
)
_URI = r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]{1,512}"
# The statement has the characters that EIP-4361 gives it: of a URI, without percent, and spaces.
_MESSAGE = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]{0,15})://)?(?P<domain>[A-Za-z0-9.:@_%\[\]-]{1,255})"
    + re.escape(INTRODUCTION)
    + r"\n(?P<address>0x[0-9a-fA-F]{40})\n"
    r"\n(?:(?P<statement>[A-Za-z0-9 ._~:/?#\[\]@!$&'()*+,;=-]{1,512})\n)?"
    rf"\nURI: (?P<uri>{_URI})"
    r"\nVersion: (?P<version>[0-9]{1,3})"
    r"\nChain ID: (?P<chain_id>[1-9][0-9]{0,15})"
    r"\nNonce: (?P<nonce>[A-Za-z0-9]{8,64})"
    rf"\nIssued At: (?P<issued_at>{_TIME})"
    rf"(?:\nExpiration Time: (?P<expiration_time>{_TIME}))?"
    rf"(?:\nNot Before: (?P<not_before>{_TIME}))?"
    r"(?:\nRequest ID: (?P<request_id>[A-Za-z0-9._~!$&'()*+,;=:@-]{0,128}))?"
    rf"(?P<resources>\nResources:(?:\n- [a-z][a-z0-9+.-]{{0,15}}:{_URI}){{0,16}})?",
    re.ASCII,
)
_RESOURCE = "\n- "
# The library reads each URI by a grammar that tries a host as an address, a name and more: 700 ms
# for 3,000 characters that were made for it.
RESOURCES_CHARACTERS_MAX = 1024
AUTHORITY_CHARACTERS_MAX = 64
_LONG_AUTHORITY = re.compile(rf"[a-z0-9+.-]+://[^/?#]{{{AUTHORITY_CHARACTERS_MAX + 1}}}")


class SiweFields(msgspec.Struct, frozen=True, kw_only=True):
    """A sign-in message in parts; None: the part is not there."""

    scheme: str | None
    domain: str
    address: str
    statement: str | None
    uri: str
    version: str
    chain_id: int
    nonce: str
    issued_at: str
    expiration_time: str | None
    not_before: str | None
    request_id: str | None
    resources: tuple[str, ...] | None


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a message must say to be for this gateway."""

    origin: str
    """`https://gateway.example.com`, as browsers write it."""
    chain_ids: tuple[int, ...]

    @property
    def scheme(self) -> str:
        return self.origin.partition("://")[0]

    @property
    def domain(self) -> str:
        return self.origin.partition("://")[2]


def read_message(text: str) -> SiweFields:
    """The parts of a message. Raises LoginRefused."""
    if len(text) > MESSAGE_BYTES_MAX:
        raise LoginRefused(f"The message has more than {MESSAGE_BYTES_MAX} characters.")
    found = _MESSAGE.fullmatch(text)
    if found is None:
        raise LoginRefused("The message is no sign-in message (EIP-4361), or too long in a part.")
    parts: dict[str, Any] = found.groupdict()
    parts["chain_id"] = int(parts["chain_id"])
    if parts["resources"] is not None:
        parts["resources"] = tuple(parts["resources"].split(_RESOURCE)[1:])
    fields = SiweFields(**parts)
    _check_resources(fields.resources or ())
    if print_message(fields) != text:
        raise LoginRefused("The message is not written in the one form of EIP-4361.")
    return fields


def _check_resources(resources: tuple[str, ...]) -> None:
    is_long = sum(map(len, resources)) > RESOURCES_CHARACTERS_MAX
    if is_long or any(_LONG_AUTHORITY.match(resource) for resource in resources):
        raise LoginRefused("The resources of the message are too long.")


def print_message(fields: SiweFields) -> str:
    """The message that has these parts."""
    scheme = "" if fields.scheme is None else f"{fields.scheme}://"
    statement = "" if fields.statement is None else f"{fields.statement}\n"
    lines = [
        f"{scheme}{fields.domain}{INTRODUCTION}",
        fields.address,
        "",
        f"{statement}",
        f"URI: {fields.uri}",
        f"Version: {fields.version}",
        f"Chain ID: {fields.chain_id}",
        f"Nonce: {fields.nonce}",
        f"Issued At: {fields.issued_at}",
    ]
    optional = {
        "Expiration Time": fields.expiration_time,
        "Not Before": fields.not_before,
        "Request ID": fields.request_id,
    }
    lines += [f"{name}: {value}" for name, value in optional.items() if value is not None]
    if fields.resources is not None:
        lines += ["Resources:", *(f"- {resource}" for resource in fields.resources)]
    return "\n".join(lines)


def check_message(fields: SiweFields, expected: Expected, now: datetime) -> None:
    """Raises LoginRefused when the message is not for this gateway, or not for now."""
    if fields.domain != expected.domain:
        raise LoginRefused(f"The message is not for the domain {expected.domain}.")
    if fields.scheme not in (None, expected.scheme):
        raise LoginRefused(f"The scheme of the message is not {expected.scheme}.")
    path = fields.uri.removeprefix(expected.origin)
    if path == fields.uri or path[:1] not in ("", "/", "?", "#"):
        raise LoginRefused(f"The URI of the message is not at {expected.origin}.")
    if fields.version != "1":
        raise LoginRefused("The version of the message is not 1.")
    if fields.chain_id not in expected.chain_ids:
        known = ", ".join(map(str, expected.chain_ids))
        raise LoginRefused(f"The chain of the message is not one of these: {known}.")
    _check_times(fields, now)
    if fields.address != checksum_address(fields.address):
        raise LoginRefused("The address is not written with its checksum (EIP-55).")


def _check_times(fields: SiweFields, now: datetime) -> None:
    issued_at = _moment(fields.issued_at, "Issued At")
    if now - issued_at > ISSUED_BEFORE_MAX:
        raise LoginRefused("The message was issued more than 5 minutes ago.")
    if issued_at - now > ISSUED_AFTER_MAX:
        raise LoginRefused("The message is issued in the future: is your clock right?")
    if fields.expiration_time is not None:
        expires_at = _moment(fields.expiration_time, "Expiration Time")
        if expires_at <= now:
            raise LoginRefused("The message has expired.")
        if expires_at - issued_at > LASTS_MAX:
            raise LoginRefused("The message expires later than 10 minutes after it was issued.")
    if fields.not_before is not None and now < _moment(fields.not_before, "Not Before"):
        raise LoginRefused("The message is not valid yet.")


def _moment(text: str, name: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as exc:
        raise LoginRefused(f"{name} is no point in time.") from exc
