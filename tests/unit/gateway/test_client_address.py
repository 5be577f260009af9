"""The client's address behind proxies, and what hostile clients try to make of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.client_address import address_group, client_address, read_networks

TRUSTED = read_networks(("10.0.0.0/8", "fd00::/8", "::1/128"))


def forwarded(*values: str | bytes) -> list[tuple[bytes, bytes]]:
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    return [(b"host", b"x"), *((b"x-forwarded-for", value) for value in raw)]


@pytest.mark.parametrize(
    ("peer", "values", "client"),
    [
        # Nobody between us and the client, whatever it says.
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["10.0.0.1"], "192.0.2.1"),
        ("192.0.2.1", ["127.0.0.1, 10.0.0.1"], "192.0.2.1"),
        # One proxy, which wrote the last entry; what stands before it is the client's word.
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["203.0.113.9, 192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["10.9.9.9, 192.0.2.1"], "192.0.2.1"),
        # Several proxies, and headers that were not joined.
        ("10.0.0.1", ["192.0.2.1, 10.0.0.3, 10.0.0.2"], "192.0.2.1"),
        ("10.0.0.1", ["203.0.113.9", "192.0.2.1", "10.0.0.2"], "192.0.2.1"),
        ("10.0.0.1", ["10.0.0.3", "10.0.0.2"], "10.0.0.3"),
        # Garbage ends the list at the hop that wrote it.
        ("10.0.0.1", ["192.0.2.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1,"], "10.0.0.1"),
        ("10.0.0.1", [b"\xff\xfe\x00"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1\t", " 10.0.0.2 "], "192.0.2.1"),
        ("10.0.0.1", ["192.0.2.1\r\n10.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", ["0x7f000001"], "10.0.0.1"),
        ("10.0.0.1", ["2130706433"], "10.0.0.1"),
        ("10.0.0.1", ["127.1"], "10.0.0.1"),
        ("10.0.0.1", ["192.000.2.1"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1/32"], "10.0.0.1"),
        ("10.0.0.1", ["١٩٢.0.2.1"], "10.0.0.1"),
        ("10.0.0.1", ['"192.0.2.1"'], "10.0.0.1"),
        ("10.0.0.1", ["for=192.0.2.1"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1:99999999"], "10.0.0.1"),
        # Ports, brackets, one spelling.
        ("10.0.0.1", ["192.0.2.1:443"], "192.0.2.1"),
        ("10.0.0.1", ["[2001:DB8::1]:443"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("10.0.0.1", ["2001:0db8:0:0:0:0:0:1"], "2001:db8::1"),
        ("10.0.0.1", ["fe80::1%eth0"], "10.0.0.1"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::1"),
        # IPv4 in IPv6 is IPv4, on a dual socket too.
        ("::ffff:10.0.0.1", ["::ffff:192.0.2.1"], "192.0.2.1"),
        ("::ffff:192.0.2.1", ["10.0.0.1"], "192.0.2.1"),
        ("10.0.0.1", ["192.0.2.1, ::ffff:10.0.0.7"], "192.0.2.1"),
        # A socket file has no address, and is no proxy that anybody configured.
        ("", ["192.0.2.1"], ""),
        ("/run/farebox.sock", ["192.0.2.1"], ""),
    ],
)
def test_the_client_is_the_first_hop_that_nobody_trusts(
    peer: str, values: list[str | bytes], client: str
) -> None:
    assert client_address(peer, forwarded(*values), TRUSTED) == client


def test_without_configured_proxies_headers_say_nothing() -> None:
    assert client_address("10.0.0.1", forwarded("192.0.2.1"), ()) == "10.0.0.1"


def test_other_headers_of_this_kind_say_nothing() -> None:
    headers = [(name, b"192.0.2.1") for name in (b"forwarded", b"x-real-ip", b"x-client-ip")]

    assert client_address("10.0.0.1", headers, TRUSTED) == "10.0.0.1"


def test_a_long_list_of_proxies_is_read_only_so_far() -> None:
    long = ", ".join(["192.0.2.1", *["10.0.0.2"] * 4000])

    assert client_address("10.0.0.1", forwarded(long), TRUSTED) == "10.0.0.2"


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_what_a_client_sends_never_hides_its_own_address(values: list[bytes]) -> None:
    """The proxy adds the address it sees to the end, in the same header or in its own."""
    own = b"198.51.100.7"
    sent = [(b"x-forwarded-for", value) for value in values]
    joined = [(b"x-forwarded-for", b",".join([*values, own]))]

    for headers in (joined, [*sent, (b"x-forwarded-for", own)]):
        assert client_address("10.0.0.1", headers, TRUSTED) == "198.51.100.7"


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("", ""),
    ],
)
def test_addresses_of_one_ipv6_network_count_as_one(address: str, group: str) -> None:
    assert address_group(address) == group
