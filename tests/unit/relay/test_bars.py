"""From where, whether at all, and with which models a credential may be used."""

import pytest

from config.ids import new_id
from gateway.errors import ApiError
from gateway.relay.bars import bars_of, check_address, check_inference, check_model
from keys.principal import Principal


def principal(**more: object) -> Principal:
    fields: dict[str, object] = {"account_id": new_id(), "virtual_key_id": new_id()}
    fields |= {"app_key_id": new_id(), "digest": b"", "expires_at": None, "account_active": True}
    return Principal(**{**fields, **more})  # type: ignore[arg-type]


def is_in(address: str, *networks: str) -> bool:
    bars = bars_of(principal(ip_allow=networks))
    assert bars is not None
    try:
        check_address(bars, address)
    except ApiError as exc:
        refused = (exc.status, exc.code)
    else:
        return True
    assert refused == (403, "ip_not_allowed")
    return False


def test_a_caller_without_bars_has_none() -> None:
    assert bars_of(principal()) is None
    assert bars_of(principal(models=frozenset({"m"}))) is None


@pytest.mark.parametrize(
    ("address", "network", "expected"),
    [
        ("203.0.113.7", "203.0.113.0/24", True),
        ("203.0.114.7", "203.0.113.0/24", False),
        ("203.0.113.7", "203.0.113.7/32", True),
        ("203.0.113.8", "203.0.113.7/32", False),
        ("::ffff:203.0.113.7", "203.0.113.0/24", True),
        ("::ffff:203.0.114.7", "203.0.113.0/24", False),
        ("203.0.113.7", "::ffff:203.0.113.0/120", True),
        ("203.0.113.7", "::/0", False),
        ("2001:db8::1", "2001:db8::/32", True),
        ("2001:db9::1", "2001:db8::/32", False),
        ("2001:db8::1%eth0", "2001:db8::/32", False),
        ("2001:db8::1", "0.0.0.0/0", False),
        ("", "0.0.0.0/0", False),
        ("unix:", "0.0.0.0/0", False),
        ("203.0.113.7, 10.0.0.1", "203.0.113.0/24", False),
    ],
)
def test_an_address_is_within_the_networks_or_refused(
    address: str, network: str, expected: bool
) -> None:
    assert is_in(address, network) is expected
    assert is_in(address, "192.0.2.1/32", network) is expected


def test_a_key_that_may_not_infer_or_lost_its_credential_is_refused() -> None:
    mute = bars_of(principal(permissions=frozenset({"account"})))
    lost = bars_of(principal(), has_lost_credential=True)
    assert mute is not None
    assert lost is not None
    check_address(mute, "anything")
    with pytest.raises(ApiError) as no_permission:
        check_inference(mute)
    with pytest.raises(ApiError) as unreadable:
        check_inference(lost)

    assert (no_permission.value.status, no_permission.value.code) == (403, "permission_missing")
    wanted = (503, "upstream_credential_unreadable")
    assert (unreadable.value.status, unreadable.value.code) == wanted


def test_a_model_is_among_the_allowed_ones_or_refused() -> None:
    allowed = frozenset(f"m{number}" for number in range(9))
    check_model(allowed, "m3")
    with pytest.raises(ApiError) as caught:
        check_model(allowed, "other")

    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
    assert caught.value.param == "model"
    assert "m0, m1, m2, m3, m4 and 4 more" in caught.value.message
    assert "other" not in caught.value.message
