"""A key's own credential for a provider goes there, and only there, as long as it is set."""

import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from config.ids import id_text, new_id, read_id
from config.secret import Secret
from config.settings import Settings
from tests.support.gateway import (
    PRICE,
    UPSTREAM_KEY,
    Gateway,
    eventually,
    make_settings,
    running_gateway,
)
from tests.support.people import Person, signed_in
from tests.support.upstream.launch import Upstream

OLD, NEW = os.urandom(32).hex(), os.urandom(32).hex()
OWN = "own-litellm-key-of-alice"
TTL_MS = 200


def settings_for(upstream: Upstream, **more: object) -> Settings:
    """The same process as two providers: what one gets is not for the other."""
    provider = {"kind": "openai", "base_url": upstream.base_url, "key": Secret(UPSTREAM_KEY)}
    both = {"zoo": provider, "litellm": provider, "echo": {"kind": "echo"}}
    keys = {"keys.encryption_key": Secret(OLD), "keys.cache_ttl_ms": TTL_MS}
    models = {
        "plain": {"routes": [{"provider": "zoo", "model": "plain"}], "price": PRICE},
        "own": {"routes": [{"provider": "litellm", "model": "plain"}], "price": PRICE},
        "both": {
            "routes": [
                {"provider": "litellm", "model": "error-500"},
                {"provider": "zoo", "model": "plain"},
            ],
            "price": PRICE,
        },
    }
    given = {name.replace("__", "."): value for name, value in more.items()}
    return make_settings(upstream.base_url, models, providers=both, **{**keys, **given})


@pytest.fixture
async def world(
    book_url: str, till_url: str, upstream: Upstream
) -> AsyncIterator[tuple[Gateway, Person]]:
    settings = settings_for(upstream)
    running = running_gateway(book_url, till_url, upstream.base_url, settings)
    async with running as gateway, signed_in(gateway) as alice:
        yield gateway, alice


async def infer(gateway: Gateway, key: str, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=30) as client:
        return await client.post(gateway.base_url + "/chat/completions", json=body)


def sent(upstream: Upstream) -> list[str]:
    """The credentials that came, since the last look."""
    found = [dict(request["headers"]).get("authorization", "") for request in upstream.last()]
    upstream.reset()
    return found


def path_of(key: dict[str, Any], provider: str = "litellm") -> str:
    return f"/keys/{key['id']}/upstream-credentials/{provider}"


async def put(person: Person, key: dict[str, Any], secret: str, provider: str = "litellm") -> Any:
    answer = await person.ask("PUT", path_of(key, provider), {"key": secret})
    assert answer.status_code == 200, answer.text
    assert secret not in answer.text
    return answer.json()


async def becomes(gateway: Gateway, upstream: Upstream, key: str, wanted: str) -> None:
    """Within the time to live of the cache, which is 4 s by default."""

    async def there() -> bool | None:
        upstream.reset()
        await infer(gateway, key, "own")
        return sent(upstream) == [f"Bearer {wanted}"] or None

    await eventually(there, timeout_s=5)


async def test_a_keys_own_credential_goes_to_its_provider_only(
    world: tuple[Gateway, Person], upstream: Upstream
) -> None:
    gateway, alice = world
    key, other = await alice.new_key(), await alice.new_key()
    shown = await put(alice, key, OWN)
    for model in ("own", "plain", "both"):
        assert (await infer(gateway, key["key"], model)).status_code == 200, model
    own, shared = f"Bearer {OWN}", f"Bearer {UPSTREAM_KEY}"

    assert shown.keys() == {"object", "provider", "created_at"}
    assert sent(upstream) == [own, shared, own, shared]
    assert (await infer(gateway, other["key"], "own")).status_code == 200
    assert sent(upstream) == [shared]


async def test_it_is_kept_sealed_and_shown_to_nobody(
    world: tuple[Gateway, Person], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    gateway, alice = world
    key = await alice.new_key()
    await put(alice, key, OWN)
    await infer(gateway, key["key"], "own")
    sealed = await gateway.pool.fetchval("SELECT sealed FROM upstream_credentials")
    listed = await alice.get(f"/keys/{key['id']}/upstream-credentials")
    read = await alice.get(path_of(key))

    assert OWN.encode() not in sealed
    assert listed["data"] == [read]
    assert OWN not in f"{listed}{read}{caplog.text}{[vars(record) for record in caplog.records]}"
    assert "key.credential_set" in caplog.text


async def test_it_is_replaced_and_deleted_within_five_seconds(
    world: tuple[Gateway, Person], upstream: Upstream
) -> None:
    gateway, alice = world
    key = await alice.new_key()
    await put(alice, key, OWN)
    await becomes(gateway, upstream, key["key"], OWN)
    await put(alice, key, OWN + "-2")
    await becomes(gateway, upstream, key["key"], OWN + "-2")
    await alice.delete(path_of(key))
    await becomes(gateway, upstream, key["key"], UPSTREAM_KEY)

    assert (await alice.get(path_of(key), 404))["code"] == "not_found"
    assert (await alice.delete(path_of(key), 404))["code"] == "not_found"


async def test_a_rotated_key_keeps_it(world: tuple[Gateway, Person], upstream: Upstream) -> None:
    gateway, alice = world
    key = await alice.new_key()
    await put(alice, key, OWN)
    rotated = await alice.post(f"/keys/{key['id']}/rotate", {})

    await becomes(gateway, upstream, rotated["key"], OWN)


async def test_a_provider_that_refuses_it_is_said_to_refuse_it(
    world: tuple[Gateway, Person], upstream: Upstream
) -> None:
    gateway, alice = world
    key = await alice.new_key()
    await put(alice, key, "unknown-to-the-provider")
    error = (await infer(gateway, key["key"], "own")).json()["error"]

    assert (error["code"], error["type"]) == ("upstream_error", "upstream_error")
    assert "upstream credential of this API key" in error["message"]
    assert sent(upstream) == ["Bearer unknown-to-the-provider"]


async def test_one_that_does_not_open_refuses_the_key_and_falls_back_to_nothing(
    world: tuple[Gateway, Person], upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that was copied from another key, as whoever can write the table could do it."""
    gateway, alice = world
    key, victim = await alice.new_key(), await alice.new_key()
    await put(alice, victim, OWN)
    await gateway.pool.execute(
        "INSERT INTO upstream_credentials (virtual_key_id, billing_account_id, provider, sealed)"
        " SELECT k.virtual_key_id, k.billing_account_id, u.provider, u.sealed"
        " FROM upstream_credentials AS u, app_api_keys AS k WHERE k.id = $1",
        read_id(key["id"]),
    )
    for model in ("own", "plain"):
        answer = await infer(gateway, key["key"], model)
        code = answer.json()["error"]["code"]
        assert (answer.status_code, code) == (503, "upstream_credential_unreadable")

    assert sent(upstream) == []
    records = [r for r in caplog.records if r.getMessage() == "key.credential_unreadable"]
    assert {vars(record)["provider"] for record in records} == {"litellm"}
    assert OWN not in caplog.text
    assert (await infer(gateway, victim["key"], "own")).status_code == 200
    await alice.delete(path_of(key))
    await becomes(gateway, upstream, key["key"], UPSTREAM_KEY)


async def test_the_encryption_key_is_changed_for_another_without_a_break(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    url, at = upstream.base_url, (book_url, till_url)
    running = running_gateway(*at, url, settings_for(upstream))
    async with running as gateway, signed_in(gateway) as alice:
        key, account_id = await alice.new_key(), alice.account_id
        await put(alice, key, OWN)
    both = settings_for(
        upstream, keys__encryption_key=Secret(NEW), keys__encryption_key_previous=Secret(OLD)
    )
    async with running_gateway(*at, url, both) as gateway:
        assert (await infer(gateway, key["key"], "own")).status_code == 200
        await reseal(gateway, both)
    only_new = settings_for(upstream, keys__encryption_key=Secret(NEW))
    async with running_gateway(*at, url, only_new) as gateway:
        assert (await infer(gateway, key["key"], "own")).status_code == 200
        assert sent(upstream) == [f"Bearer {OWN}"] * 2
    only_old = settings_for(upstream)
    async with running_gateway(*at, url, only_old) as gateway:
        assert (await infer(gateway, key["key"], "own")).status_code == 503
        assert (await gateway.account_of(key["key"])) == account_id
    assert sent(upstream) == []


async def reseal(gateway: Gateway, settings: Settings) -> None:
    from billing import book
    from keys import upstream_store
    from keys.sealed import sealer_of

    async with book.acquire(gateway.pool) as conn:
        assert await upstream_store.reseal_all(conn, sealer_of(settings.keys)) == 1


async def test_what_is_no_credential_and_whose_it_is_not(
    world: tuple[Gateway, Person],
) -> None:
    gateway, alice = world
    key = await alice.new_key()
    for secret in ("short", "with a space", "a\r\nhost: evil", "\u00e9" * 9, "x" * 513, 12345678):
        answer = await alice.ask("PUT", path_of(key), {"key": secret})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "key")
        assert str(secret) not in answer.text
    for provider in ("nobody", "echo", "http:%2f%2fevil", "..%2f", "a" * 300):
        answer = await alice.ask("PUT", path_of(key, provider), {"key": OWN})
        assert answer.status_code == 404, provider
    await put(alice, key, OWN)
    async with signed_in(gateway) as bob:
        for method in ("PUT", "GET", "DELETE"):
            answer = await bob.ask(method, path_of(key), {"key": OWN})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    absent = {"id": f"key_{id_text(new_id())}"}
    assert (await alice.ask("PUT", path_of(absent), {"key": OWN})).status_code == 404
    await alice.delete(f"/keys/{key['id']}")
    assert (await alice.ask("PUT", path_of(key), {"key": OWN})).status_code == 404


async def test_without_an_encryption_key_nothing_is_kept(gateway: Gateway) -> None:
    async with signed_in(gateway) as alice:
        key = await alice.new_key()
        answer = await alice.ask("PUT", path_of(key, "zoo"), {"key": OWN})

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert await gateway.pool.fetchval("SELECT count(*) FROM upstream_credentials") == 0
    assert msgspec.structs.asdict(gateway.services.settings.keys)["encryption_key"] == Secret()
