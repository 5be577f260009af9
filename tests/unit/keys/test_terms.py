"""What may be asked for a key: ends and networks."""

from datetime import UTC, datetime, timedelta

import pytest

from keys.terms import check_expiry, read_networks

NOW = datetime(2026, 11, 25, tzinfo=UTC)


@pytest.mark.parametrize("after", [timedelta(seconds=1), timedelta(days=36_525)])
def test_a_key_may_end_in_the_future(after: timedelta) -> None:
    check_expiry(NOW + after, NOW)


@pytest.mark.parametrize("after", [timedelta(0), timedelta(days=-1), timedelta(days=36_526)])
def test_a_key_ends_neither_in_the_past_nor_in_another_age(after: timedelta) -> None:
    with pytest.raises(ValueError, match="key"):
        check_expiry(NOW + after, NOW)


def test_networks_have_one_written_form() -> None:
    texts = ["203.0.113.7", "203.0.113.7/32", "10.0.0.0/8", "2001:DB8:0::/32"]

    assert read_networks(texts) == ("203.0.113.7/32", "10.0.0.0/8", "2001:db8::/32")


@pytest.mark.parametrize(
    "text", ["", "x", "10.0.0.1/8", "10.0.0.0/33", "fe80::1%eth0", "1" * 60, "10.0.0.0/8\n", "0x7f"]
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no IP address"):
        read_networks([text])
