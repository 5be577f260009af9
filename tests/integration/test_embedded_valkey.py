"""Embedded Valkey: real server, real append-only file."""

import os
import signal
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from billing.till_link import TillLink
from gateway.embedded.errors import StoreStartFailed
from gateway.embedded.valkey import EmbeddedValkey, process_id, quoted


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


async def test_its_socket_is_for_its_user_only_and_serves_every_client_of_ours() -> None:
    with TemporaryDirectory(prefix="s 'p", dir="/tmp") as folder:
        valkey = EmbeddedValkey(Path(folder))
        await valkey.start()
        mode = valkey.socket.stat().st_mode

        assert valkey.local_url.startswith("unix://")
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o700)
        assert await process_id(valkey.local_url) == valkey.pid
        async with Redis.from_url(valkey.local_url) as client:
            assert await client.ping()
        link = TillLink(valkey.local_url, [], call_timeout_s=5, stall_timeout_s=5, pending_max=10)
        link.start()
        assert await link.wait_up(5)
        assert await link.command(("SET", "a", "b")) == b"OK"
        await link.close()
        wrong = valkey.local_url.replace(valkey.password, "wrong")
        async with Redis.from_url(wrong) as client:
            with pytest.raises(RedisConnectionError, match="invalid username-password"):
                await client.ping()
        await valkey.stop()


def test_a_path_that_is_too_long_for_a_socket_leaves_tcp(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / ("x" * 100))
    valkey.root.mkdir()
    (valkey.root / "password").write_text("secret")

    assert valkey.local_url == valkey.url


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
