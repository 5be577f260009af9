"""How often an address may try to sign in, and a wallet sign in, wherever they do it.

Failure: SessionsUnavailable when the till does not count; then nobody tries.
"""

from typing import Any

from litestar import Request

from billing.errors import BillingError
from gateway.client_address import address_group, client_address
from gateway.errors import ApiError, unavailable
from gateway.services import Services
from gateway.sign_in import CountWallet
from keys.errors import SessionsUnavailable

WINDOW_S = 60
# Nonces are kept for five minutes beside the money, in a store that must never be full: 30,000.
NONCES_MAX, NONCES_WINDOW_S = 1000, 10


async def count_address(services: Services, request: Request[Any, Any, Any]) -> None:
    """Count a try of the client's address: a nonce, or a signed message. Raises ApiError 429."""
    limit = services.settings.identity.tries_per_address_per_minute
    await _count(services, f"login:address:{_address(services, request)}", limit)


async def count_nonce(services: Services) -> None:
    """Count a nonce, whoever asks: strangers have many addresses. Raises ApiError 503."""
    may, wait_ms = await _take(services, "login:nonces", NONCES_MAX, NONCES_WINDOW_S)
    if not may:
        raise unavailable("Too many people are signing in.", retry_after_s=-(-wait_ms // 1000))


def wallet_counter(services: Services) -> CountWallet:
    """Counts a signature that was proved to be a wallet's. Raises ApiError 429."""

    async def count(address: str) -> None:
        limit = services.settings.identity.tries_per_wallet_per_minute
        await _count(services, f"login:wallet:{address.lower()}", limit)

    return count


async def _count(services: Services, name: str, limit: int) -> None:
    may, wait_ms = await _take(services, name, limit, WINDOW_S)
    if not may:
        wait_s = -(-wait_ms // 1000)
        headers = ((b"retry-after", b"%d" % wait_s), (b"retry-after-ms", b"%d" % wait_ms))
        message = f"Too many sign-ins were tried. Try again in {wait_s} seconds."
        raise ApiError(429, "rate_limited", message, kind="rate_limit_error", headers=headers)


async def _take(services: Services, name: str, limit: int, window_s: int) -> tuple[bool, int]:
    try:
        return await services.limiter.take(name, limit, window_s)
    except BillingError as exc:
        raise SessionsUnavailable from exc


def _address(services: Services, request: Request[Any, Any, Any]) -> str:
    """What counts as one address."""
    peer = request.client.host if request.client is not None else ""
    return address_group(client_address(peer, request.scope["headers"], services.proxies))
