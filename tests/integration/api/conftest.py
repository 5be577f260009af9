"""Somebody who signed in, and an operator, in front of a running gateway."""

from collections.abc import AsyncIterator

import pytest

from tests.support.gateway import Gateway
from tests.support.people import Person, operating, signed_in


@pytest.fixture
async def alice(gateway: Gateway) -> AsyncIterator[Person]:
    async with signed_in(gateway) as person:
        yield person


@pytest.fixture
async def bob(gateway: Gateway) -> AsyncIterator[Person]:
    async with signed_in(gateway) as person:
        yield person


@pytest.fixture
async def operator(gateway: Gateway) -> AsyncIterator[Person]:
    async with operating(gateway) as person:
        yield person
