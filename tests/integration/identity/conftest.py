"""A gateway for people who sign in: clients sign on its event loop, so it is patient."""

from collections.abc import AsyncIterator

import pytest

from tests.support.gateway import Gateway, make_settings, running_gateway
from tests.support.upstream.launch import Upstream
from tests.support.wallets import Visitor, visiting


@pytest.fixture
async def gateway(book_url: str, till_url: str, upstream: Upstream) -> AsyncIterator[Gateway]:
    settings = make_settings(
        upstream.base_url,
        till__call_timeout_ms=2000,
        identity__tries_per_address_per_minute=1000,
        identity__tries_per_wallet_per_minute=1000,
    )
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        yield gateway


@pytest.fixture
async def visitor(gateway: Gateway) -> AsyncIterator[Visitor]:
    async with visiting(gateway) as visitor:
        yield visitor
