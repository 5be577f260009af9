"""Nothing goes to a provider whose hold cannot be marked as forwarded first."""

from typing import Any

from tests.support.gateway import Gateway
from tests.support.rawclient import chat, exchange
from tests.support.relay import MESSAGES, error_of
from tests.support.upstream.launch import Upstream


async def test_a_till_that_goes_after_admitting_keeps_the_request_from_the_provider(
    gateway: Gateway, upstream: Upstream
) -> None:
    """The mark was lost, the stream went out, and a sweeper voided it after its worker's death."""
    services, key = gateway.services, await gateway.key()
    admit = services.till.admit

    async def admit_and_go(*args: Any) -> None:
        await admit(*args)
        connection = services.link._connection
        assert connection is not None
        connection.abort()
        await connection.closed

    services.till.admit = admit_and_go  # type: ignore[method-assign, assignment]
    answer = await exchange(gateway.origin, chat(key, {"model": "plain", "messages": MESSAGES}))
    services.till.admit = admit  # type: ignore[method-assign]
    again = await exchange(gateway.origin, chat(key, {"model": "plain", "messages": MESSAGES}))
    await gateway.at_rest()

    assert (answer.status, error_of(answer)["code"]) == (503, "unavailable")
    assert again.status == 200
    receipts = await gateway.receipts(2)
    assert sorted(r["outcome"] for r in receipts) == ["complete", "voided"]
    assert upstream.stats()["requests"] == 1
