"""Rotation over HTTP: two secrets for a while, one answer for one Idempotency-Key, one winner."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from billing import book
from config.ids import read_id
from keys.errors import RotationInProgress
from keys.keys_store import Rotation, rotate_key
from tests.support.gateway import PEPPER, Gateway, eventually
from tests.support.people import Person, calling

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONCE = "rotate-1"


async def status_of(gateway: Gateway, secret: str) -> int:
    async with calling(gateway, secret) as key:
        return (await key.ask("GET", "/key")).status_code


async def ended(gateway: Gateway, secret: str) -> None:
    """Wait until a secret is refused."""

    async def refused() -> bool | None:
        return await status_of(gateway, secret) == 401 or None

    await eventually(refused, 5)


async def test_both_secrets_work_while_the_overlap_lasts(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key(budget={"credits": "5", "window": "day"})
    before = datetime.now(UTC)
    rotated = await alice.post(f"/keys/{made['id']}/rotate", {"overlap_s": 600})

    assert await status_of(gateway, made["key"]) == 200
    assert await status_of(gateway, rotated["key"]) == 200
    assert rotated["key"] != made["key"]
    assert rotated["hint"] == f"{rotated['key'][:12]}...{rotated['key'][-4:]}"
    ends_at = datetime.fromisoformat(rotated["previous_expires_at"])
    assert 590 < (ends_at - before).total_seconds() < 610
    changed = {"key", "hint", "rotated_at", "previous_expires_at"}
    assert {n: v for n, v in rotated.items() if n not in changed} == {
        n: v for n, v in made.items() if n not in changed
    }


async def test_the_virtual_key_and_its_spend_stay(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key()
    query = "SELECT virtual_key_id FROM app_api_keys WHERE id = $1"
    before = await gateway.pool.fetchval(query, read_id(made["id"]))
    await alice.post(f"/keys/{made['id']}/rotate", {})

    assert await gateway.pool.fetchval(query, read_id(made["id"])) == before


async def test_without_overlap_the_old_secret_ends(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key()
    assert await status_of(gateway, made["key"]) == 200
    rotated = await alice.post(f"/keys/{made['id']}/rotate", {})

    await ended(gateway, made["key"])
    assert await status_of(gateway, rotated["key"]) == 200
    assert rotated["previous_expires_at"] is None


async def test_the_old_secret_ends_with_the_overlap(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key()
    await alice.post(f"/keys/{made['id']}/rotate", {"overlap_s": 600})
    assert await status_of(gateway, made["key"]) == 200
    await gateway.tamper(
        "UPDATE app_api_keys SET previous_expires_at = now() WHERE id = $1", read_id(made["id"])
    )

    await ended(gateway, made["key"])


async def test_a_secret_that_leaked_during_its_overlap_can_be_ended(
    gateway: Gateway, alice: Person
) -> None:
    """It went on for up to a week, or the key had to be revoked with its budget and name."""
    made = await alice.new_key()
    path = f"/keys/{made['id']}/rotate"
    second = await alice.post(path, {"overlap_s": 600})
    last = await alice.post(path, {})

    await ended(gateway, made["key"])
    await ended(gateway, second["key"])
    assert await status_of(gateway, last["key"]) == 200
    assert last["previous_expires_at"] is None


async def test_the_same_idempotency_key_gives_the_same_secret(alice: Person) -> None:
    made = await alice.new_key()
    path = f"/keys/{made['id']}/rotate"
    first = await alice.post(path, {"overlap_s": 60}, idempotency_key=ONCE)

    assert await alice.post(path, {"overlap_s": 60}, idempotency_key=ONCE) == first
    other = await alice.post(path, {"overlap_s": 60}, 409, idempotency_key="another")
    plain = await alice.post(path, {"overlap_s": 60}, 409)
    mismatch = await alice.post(path, {"overlap_s": 61}, 422, idempotency_key=ONCE)
    assert other["code"] == plain["code"] == "rotation_in_progress"
    assert first["previous_expires_at"][:19] in plain["message"].replace("+00:00", "")
    assert mismatch["code"] == "idempotency_mismatch"


async def test_one_idempotency_key_never_brings_an_old_secret_back(alice: Person) -> None:
    """Used again after other rotations, it would otherwise revive what may have leaked."""
    made = await alice.new_key()
    other = await alice.new_key()
    path = f"/keys/{made['id']}/rotate"
    secrets = [
        (await alice.post(path, {}, idempotency_key=ONCE))["key"],
        (await alice.post(path, {}))["key"],
        (await alice.post(path, {}, idempotency_key=ONCE))["key"],
        (await alice.post(path, {}, idempotency_key=ONCE))["key"],
        (await alice.post(f"/keys/{other['id']}/rotate", {}, idempotency_key=ONCE))["key"],
    ]

    assert secrets[2] == secrets[3]
    assert len(set(secrets)) == 4


@pytest.mark.parametrize("overlap_s", [0, 60])
async def test_of_parallel_rotations_one_wins(
    gateway: Gateway, alice: Person, overlap_s: int
) -> None:
    """All see the same key before any of them has changed it."""
    made = await alice.new_key()
    answers = await race(gateway, alice, made["id"], [b""] * 4, overlap_s)

    won = [new for _, new in (answer for answer in answers if isinstance(answer, tuple))]
    lost = [answer for answer in answers if isinstance(answer, RotationInProgress)]
    assert (len(won), len(lost)) == (1, 3)
    assert await status_of(gateway, won[0].secret) == 200


async def test_parallel_rotations_with_one_idempotency_key_get_one_secret(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.new_key()
    answers = await race(gateway, alice, made["id"], [b"same"] * 4, 60)

    assert len({new.secret for _, new in answers}) == 1


async def race(
    gateway: Gateway, alice: Person, key_id: str, once_keys: list[bytes], overlap_s: int
) -> list[Any]:
    """Rotations that read the key while another one holds its row."""
    async with book.acquire(gateway.pool) as holder:
        async with holder.transaction():
            await holder.execute(
                "SELECT id FROM app_api_keys WHERE id = $1 FOR UPDATE", read_id(key_id)
            )
            running = [
                asyncio.ensure_future(rotate(gateway, alice, key_id, once_key, overlap_s))
                for once_key in once_keys
            ]
            await eventually(lambda: waiting(holder, len(once_keys)))
        return list(await asyncio.gather(*running, return_exceptions=True))


async def rotate(
    gateway: Gateway, alice: Person, key_id: str, once_key: bytes, overlap_s: int
) -> Any:
    rotation = Rotation(peppers=[PEPPER.encode()], overlap_s=overlap_s, once_key=once_key)
    conn = await book.connect(gateway.book_url)
    try:
        return await rotate_key(conn, alice.account_id, read_id(key_id), rotation)
    finally:
        await conn.close()


async def waiting(conn: Any, count: int) -> bool | None:
    query = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
    return await conn.fetchval(query) == count or None


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"overlap_s": -1}, {}, "overlap_s"),
        ({"overlap_s": 604_801}, {}, "overlap_s"),
        ({"overlap_s": "60"}, {}, "overlap_s"),
        ({"overlap": 60}, {}, "overlap"),
        ({}, {"idempotency_key": "x" * 256}, None),
        ({}, {"idempotency_key": "\x7f"}, None),
    ],
)
async def test_a_rotation_that_is_none_is_refused(
    alice: Person, body: dict[str, Any], headers: dict[str, str], param: str | None
) -> None:
    made = await alice.new_key()
    error = await alice.post(f"/keys/{made['id']}/rotate", body, 400, **headers)

    assert (error["code"], error["param"]) == ("invalid_request", param)


async def test_a_rotated_key_has_one_revocation(gateway: Gateway, alice: Person) -> None:
    made = await alice.new_key()
    path = f"/keys/{made['id']}"
    rotated = await alice.post(f"{path}/rotate", {"overlap_s": 600}, idempotency_key=ONCE)
    await alice.delete(path)

    await ended(gateway, made["key"])
    await ended(gateway, rotated["key"])
    error = await alice.post(f"{path}/rotate", {"overlap_s": 600}, 409, idempotency_key=ONCE)
    assert error["code"] == "key_revoked"


async def test_a_repetition_is_known_while_the_pepper_is_changed(
    gateway: Gateway, alice: Person
) -> None:
    made = await alice.new_key()
    old, new = PEPPER.encode(), b"n" * 32
    answers = []
    async with book.acquire(gateway.pool) as conn:
        for peppers in ([old], [new, old]):
            rotation = Rotation(peppers=peppers, overlap_s=60, once_key=b"peppered")
            answers.append(await rotate_key(conn, alice.account_id, read_id(made["id"]), rotation))
        forgotten = Rotation(peppers=[new], overlap_s=60, once_key=b"peppered")
        with pytest.raises(RotationInProgress):
            await rotate_key(conn, alice.account_id, read_id(made["id"]), forgotten)

    assert answers[0][1].secret == answers[1][1].secret
    assert await status_of(gateway, answers[1][1].secret) == 200
