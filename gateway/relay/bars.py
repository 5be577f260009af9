"""What a credential may not do: from where, whether at all, and with which models.

Most callers have no bars at all, and pay nothing for those of others.
"""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

import msgspec

from config.settings import Settings
from gateway.client_address import Network, client_address, read_address, read_networks
from gateway.errors import NOT_CHARGED, ApiError, unavailable
from keys.principal import Principal

IPV4_IN_IPV6 = IPv6Network("::ffff:0:0/96")
MODELS_NAMED_MAX = 5


class Bars(msgspec.Struct, frozen=True, kw_only=True):
    """Of one caller, made once."""

    networks: tuple[Network, ...]
    """None: from anywhere."""
    may_infer: bool
    has_lost_credential: bool
    """An upstream credential of its own cannot be opened."""


def bars_of(principal: Principal, *, has_lost_credential: bool = False) -> Bars | None:
    """The bars of a principal, None when it has none but its models."""
    networks = tuple(_network(text) for text in principal.ip_allow)
    may_infer = "infer" in principal.permissions
    if not networks and may_infer and not has_lost_credential:
        return None
    return Bars(networks=networks, may_infer=may_infer, has_lost_credential=has_lost_credential)


def caller_address(
    peer: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]], settings: Settings
) -> str:
    """The address a request comes from; "" for a Unix socket."""
    trusted = _networks(tuple(settings.server.trusted_proxies))
    return "" if peer is None else client_address(peer[0], headers, trusted)


def check_address(bars: Bars, address: str) -> None:
    """Raises ApiError 403 when the credential may not be used from there."""
    if bars.networks and not _is_in(bars.networks, address):
        message = "This API key may not be used from this address."
        raise _forbidden("ip_not_allowed", message)


def check_inference(bars: Bars) -> None:
    """Raises ApiError when the credential may not call models, or not as it is meant to."""
    if not bars.may_infer:
        message = "This API key lacks the permission 'infer'."
        raise _forbidden("permission_missing", message)
    if bars.has_lost_credential:
        # With the provider's own key instead, the upstream would take it for somebody else.
        message = "The upstream credential of this API key cannot be opened. Tell the operator."
        raise unavailable(message, "upstream_credential_unreadable")


def check_model(models: frozenset[str], model: str) -> None:
    """Raises ApiError 403 for a model that is not among these, whether there is one or not."""
    if model in models:
        return
    first = ", ".join(sorted(models)[:MODELS_NAMED_MAX])
    more = "" if len(models) <= MODELS_NAMED_MAX else f" and {len(models) - MODELS_NAMED_MAX} more"
    message = f"This API key may not use that model, only {first}{more}."
    raise _forbidden("model_not_allowed", message, param="model")


def _forbidden(code: str, message: str, param: str | None = None) -> ApiError:
    text = f"{message} {NOT_CHARGED}"
    return ApiError(403, code, text, kind="permission_error", param=param)


def _is_in(networks: tuple[Network, ...], text: str) -> bool:
    address = read_address(text)
    return address is not None and any(address in network for network in networks)


@lru_cache(maxsize=8)
def _networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    return read_networks(texts)


def _network(text: str) -> Network:
    """IPv4 in IPv6 is IPv4 on both sides."""
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.subnet_of(IPV4_IN_IPV6):
        mapped = network.network_address.ipv4_mapped
        assert mapped is not None
        return IPv4Network((mapped, network.prefixlen - 96))
    return network
