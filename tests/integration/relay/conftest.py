"""One gateway for each module of this folder; after each test nothing may be left open."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.gateway import make_settings
from tests.support.relay import Relay, running_relay
from tests.support.upstream.launch import Upstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay_of_module(
    template_url: str,
    valkey_url: str,
    upstream_process: Upstream,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Relay]:
    module = request.module
    url = upstream_process.base_url
    overrides = getattr(module, "OVERRIDES", {})
    if hasattr(module, "overrides_at"):  # what needs the provider's address
        overrides = module.overrides_at(url)
    settings = make_settings(url, module.MODELS, **overrides)
    name = "t_" + module.__name__.rsplit(".", 1)[-1]
    async with running_relay(template_url, valkey_url, url, settings, name) as relay:
        yield relay


@pytest_asyncio.fixture(loop_scope="module")
async def relay(relay_of_module: Relay, upstream: Upstream) -> AsyncIterator[Relay]:
    """The module's gateway; the upstream's counters are at zero."""
    yield relay_of_module
    await relay_of_module.at_rest()


@pytest_asyncio.fixture(loop_scope="module")
async def key(relay: Relay) -> str:
    """A key of a new account with 1,000 credits."""
    return await relay.key()
