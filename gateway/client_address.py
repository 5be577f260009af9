"""Whose address a request comes from. Forwarded headers are believed of configured proxies only.

Pure. Whatever a client writes into `x-forwarded-for` stands left of what our proxies write, so the
list is read from the right, and only for as long as the hop that wrote an entry is trusted.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

FORWARDED_FOR = b"x-forwarded-for"
# Nobody has that many proxies; whoever writes more wants us to read them.
HOPS_MAX = 32
# `[address]`, `[address]:port` and `address:port`, of which the last is IPv4 alone.
BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]{2,45})\](?::[0-9]{1,5})?")
WITH_PORT = re.compile(r"([0-9.]{7,15}):[0-9]{1,5}")
ADDRESS_CHARS_MAX = 60
# A household or a host has at least that much of IPv6: one address says nothing.
IPV6_PREFIX = 64


def read_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks in CIDR notation, as the settings have checked them. Raises ValueError."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def client_address(
    peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network]
) -> str:
    """The address of the client in its one spelling; '' when the peer has none (a socket file).

    peer: of the connection, without port. headers: names in lower case, in their order, repeated
    ones too. What cannot be read ends the list: the hop that wrote it is the answer.
    """
    hop = read_address(peer)
    if hop is None:
        return ""
    if not trusted or not _is_in(hop, trusted):
        return str(hop)
    whole = b",".join(value for name, value in headers if name == FORWARDED_FOR)
    for entry in reversed(whole.rsplit(b",", HOPS_MAX)[-HOPS_MAX:]):
        before = read_address(entry.decode("latin-1"))
        if before is None:
            break
        hop = before
        if not _is_in(hop, trusted):
            break
    return str(hop)


def address_group(address: str) -> str:
    """What limits per address count as one: an IPv4 address, or the /64 of an IPv6 address."""
    parsed = read_address(address)
    if not isinstance(parsed, ipaddress.IPv6Address):
        return address
    return str(ipaddress.IPv6Network((parsed, IPV6_PREFIX), strict=False))


def read_address(text: str) -> Address | None:
    """An address with or without a port; None for anything else, zones (`%eth0`) included."""
    text = text.strip(" \t")
    if len(text) > ADDRESS_CHARS_MAX or "%" in text:
        return None
    found = BRACKETED.fullmatch(text) or WITH_PORT.fullmatch(text)
    try:
        address = ipaddress.ip_address(found[1] if found else text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
