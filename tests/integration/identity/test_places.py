"""Where people can sign in: at the public origin, else on loopback, and as the guide says."""

import asyncio
import os
import re
import sys
from pathlib import Path

import msgspec
import pytest

from gateway.siwe_helper import COMMAND
from keys.siwe_wire import Terms
from tests.support.gateway import Gateway, make_settings, running_gateway
from tests.support.upstream.launch import Upstream
from tests.support.wallets import KeyWallet, Visitor, visiting, write_message

GUIDE = Path(__file__).parents[3] / "docs/guides/sign-in.md"
PUBLIC = "https://farebox.example"


async def test_at_a_public_origin_cookies_are_for_it_alone(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = make_settings(
        upstream.base_url, identity__public_origin=PUBLIC, till__call_timeout_ms=2000
    )
    async with (
        running_gateway(book_url, till_url, upstream.base_url, settings) as gateway,
        visiting(gateway) as visitor,
    ):
        client, wallet = visitor.client, KeyWallet()
        answer = await client.post("/api/v1/auth/nonce", headers={"origin": PUBLIC})
        said = answer.json()
        assert (said["domain"], said["uri"]) == ("farebox.example", PUBLIC)
        text = write_message(wallet.address, said)
        body = {"message": text, "signature": wallet.sign(text)}
        cookie = answer.headers["set-cookie"]
        headers = {"origin": PUBLIC, "cookie": cookie.partition(";")[0]}
        entered = await client.post("/api/v1/auth/verify", json=body, headers=headers)
        assert entered.status_code == 200, entered.text
        kept = next(c for c in entered.headers.get_list("set-cookie") if "farebox=" in c)
        for one, name in ((cookie, "__Host-farebox-login="), (kept, "__Host-farebox=")):
            assert one.startswith(name)
            assert {"Secure", "HttpOnly", "Path=/"} <= set(one.split("; "))
            assert "domain" not in one.lower()

        async def status(cookie: str) -> int:
            url = "/api/v1/auth/session"
            return (await client.get(url, headers={"cookie": cookie})).status_code

        session = kept.partition(";")[0]
        assert await status(session) == 200
        # A cookie of that name may come from another host of the domain.
        assert await status(session.removeprefix("__Host-")) == 401
        loopback = await client.post("/api/v1/auth/nonce")
        assert loopback.status_code == 403  # its Origin is another one


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", "a b"]
)
async def test_whoever_names_another_host_cannot_sign_in(host: str, visitor: Visitor) -> None:
    answer = await visitor.client.post("/api/v1/auth/nonce", headers={"host": host})

    assert answer.status_code in (400, 403), answer.text
    assert "set-cookie" not in answer.headers


async def test_the_guides_example_runs_as_it_stands(gateway: Gateway) -> None:
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    environ = {**os.environ, "FAREBOX_ORIGIN": gateway.origin}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", found[1], env=environ, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()

    assert process.returncode == 0
    assert re.fullmatch(rb"acct_[0-9a-z]+ 0x[0-9a-fA-F]{40}\n", said)


async def test_who_verifies_goes_with_its_worker() -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    terms = Terms(rpc_urls=(), timeout_s=1)
    process.stdin.write(msgspec.json.encode(terms) + b"\n")
    assert await process.stdout.readline()
    process.stdin.close()

    assert await asyncio.wait_for(process.wait(), 10) == 0
