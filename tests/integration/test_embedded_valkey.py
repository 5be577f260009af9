"""Embedded Valkey: real server, real append-only file."""

import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ResponseError

from gateway.embedded.errors import StoreStartFailed
from gateway.embedded.valkey import EmbeddedValkey, quoted


async def test_keys_and_password_survive_a_restart(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    await valkey.start()
    password = valkey.password
    async with Redis.from_url(valkey.url) as client:
        await client.set("kept", "yes")
    await valkey.stop()

    await valkey.start()

    assert valkey.password == password
    assert stat.S_IMODE((tmp_path / "password").stat().st_mode) == 0o600
    async with Redis.from_url(valkey.url, decode_responses=True) as client:
        assert await client.get("kept") == "yes"
    await valkey.stop()


async def test_torn_tail_of_a_killed_server_is_dropped(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    await valkey.start()
    async with Redis.from_url(valkey.url) as client:
        await client.set("whole", "yes")
    os.kill(valkey.pid, signal.SIGKILL)
    await valkey.stop()
    log = next((tmp_path / "data" / "appendonlydir").glob("*.incr.aof"))
    with log.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nto")

    await valkey.start()

    async with Redis.from_url(valkey.url, decode_responses=True) as client:
        assert await client.get("whole") == "yes"
        assert await client.dbsize() == 1
    await valkey.stop()


async def test_only_the_password_opens_it_and_debug_is_off(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path, settings={"maxclients": "123"})
    await valkey.start()

    wrong = valkey.url.replace(valkey.password, "wrong")
    async with Redis.from_url(wrong) as client:
        with pytest.raises(AuthenticationError):
            await client.ping()
    async with Redis.from_url(valkey.url, decode_responses=True) as client:
        with pytest.raises(ResponseError, match="DEBUG command not allowed"):
            await client.debug_object("key")
        config = await client.config_get()
    expected = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
    expected |= {"save": "", "maxclients": "123", "bind": "127.0.0.1"}
    assert {name: config[name] for name in expected} == expected
    listening = {c.laddr.ip for c in psutil.Process(valkey.pid).net_connections("tcp")}
    assert listening == {"127.0.0.1"}
    await valkey.stop()


async def test_folder_may_have_blanks_and_quotes_in_its_name(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / 'a "b" \\ ü')

    await valkey.start()

    assert (valkey.data / "appendonlydir").is_dir()
    await valkey.stop()


async def test_broken_append_only_file_fails_with_the_reason_from_the_log(tmp_path: Path) -> None:
    manifest = tmp_path / "data" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("nonsense\n")

    with pytest.raises(StoreStartFailed, match="AOF manifest"):
        await EmbeddedValkey(tmp_path).start()


def test_quoted_word_has_one_line() -> None:
    assert quoted('a"\\\n') == '"a\\"\\\\\\n"'
