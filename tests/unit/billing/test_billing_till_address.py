"""Where the till is, by its URL."""

import pytest

from billing.till_address import Address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://till", Address("till", 6379, False, "", "", 0)),
        ("rediss://u:p%40@till:6380/3", Address("till", 6380, True, "u", "p@", 3)),
        ("valkey://:p@[::1]:7000", Address("::1", 7000, False, "", "p", 0)),
        ("unix:///run/till.sock", Address("", 0, False, "", "", 0, "/run/till.sock")),
        ("unix://u:p%2F@/a%20b?db=2", Address("", 0, False, "u", "p/", 2, "/a b")),
    ],
)
def test_what_a_url_says(url: str, address: Address) -> None:
    assert Address.read(url) == address


@pytest.mark.parametrize("url", ["http://till", "redis://", "unix://", "unix://host/path", "till"])
def test_what_is_no_url_of_a_till(url: str) -> None:
    with pytest.raises(ValueError, match="URL must be"):
        Address.read(url)
