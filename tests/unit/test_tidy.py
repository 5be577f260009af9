"""The tree obeys the rules of tests/support/tidy.py, and each rule finds what it forbids."""

from pathlib import Path

import pytest

from tests.support import tidy, tidy_tables
from tests.support.tidy import Rule, Source

ROOT = Path(__file__).parents[2]

LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 60
DEEP = """
def deep(a):
    for b in a:
        if b:
            with b:
                try:
                    while b:
                        pass
                finally:
                    pass
"""
DEEP_ENOUGH = """
def flat(a):
    if a == 1:
        for b in a:
            while b:
                if b:
                    pass
                elif a:
                    pass
    elif a == 2:
        pass
    elif a == 3:
        pass
    elif a == 4:
        pass
    elif a == 5:
        pass
"""
GROUP = """
async def both(a, b):
    async with asyncio.TaskGroup() as group:
        group.create_task(a)
        group.create_task(b)
"""
CLEANUP = """
try:
    work()
except BaseException:
    tidy_up()
    raise
"""
SWALLOWS = """
try:
    work()
except BaseException:
    tidy_up()
"""

# Rule, path, source, and the violations: line and a part of what is said.
BAD: list[tuple[Rule, str, str, list[tuple[int, str]]]] = [
    (tidy.file_size, "keys/a.py", "x = 1\n" * 401, [(401, "401 lines")]),
    (tidy.function_size, "tests/a.py", LONG_FUNCTION, [(1, "long has 61 lines")]),
    (tidy.nesting, "bench/a.py", DEEP, [(7, "level 5")]),
    (
        tidy.nesting,
        "keys/a.py",
        "def f():\n if a:\n  if a:\n   if a:\n    def g():\n     if a:\n      pass\n",
        [(6, "level 5")],
    ),
    (tidy.import_direction, "config/a.py", "import keys.store", [(1, "config must not")]),
    (tidy.import_direction, "keys/a.py", "\nfrom billing import money", [(2, "keys must not")]),
    (tidy.import_direction, "billing/a.py", "from keys import store", [(1, "billing must not")]),
    (tidy.import_direction, "billing/a.py", "import gateway", [(1, "import gateway")]),
    (tidy.import_direction, "billing/a.py", "import migrations", [(1, "import migrations")]),
    (tidy.import_direction, "migrations/a.py", "import billing", [(1, "import billing")]),
    (tidy.import_direction, "gateway/a.py", "import tests.support", [(1, "import tests")]),
    (
        tidy.import_direction,
        "keys/a.py",
        "def f():\n    import importlib\n    importlib.import_module('gateway.app')\n",
        [(3, "keys must not import gateway")],
    ),
    (
        tidy.import_direction,
        "gateway/relay/reply.py",
        "from gateway.api import keys",
        [(1, "gateway.relay must not import gateway.api.keys")],
    ),
    (
        tidy.import_direction,
        "gateway/relay/forward.py",
        "from ..api.keys import routes",
        [(1, "gateway.relay must not import gateway.api.keys.routes")],
    ),
    (
        tidy.import_direction,
        "gateway/providers/azure.py",
        "from gateway import relay",
        [(1, "gateway.providers must not import gateway.relay")],
    ),
    (
        tidy.import_direction,
        "gateway/api/keys.py",
        "from gateway.app import app",
        [(1, "gateway.api must not import gateway.app.app")],
    ),
    (
        tidy.import_direction,
        "gateway/protocols/chat.py",
        "from gateway.errors import BadRequest\nfrom gateway.services import Services",
        [(2, "gateway.protocols must not import gateway.services.Services")],
    ),
    (
        tidy.import_direction,
        "gateway/relay/admit.py",
        "from gateway.relay import settle\nfrom . import meter\nfrom .pipeline import run",
        [(1, "relay.settle"), (2, "relay.meter"), (3, "relay.pipeline.run")],
    ),
    (tidy.one_door, "billing/settle.py", "import asyncpg", [(1, "asyncpg (doors: billing/book")]),
    (tidy.one_door, "gateway/relay/a.py", "import aiohappyeyeballs", [(1, "providers/http")]),
    (tidy.one_door, "gateway/app.py", "import numpy.linalg", [(1, "numpy (doors: none yet")]),
    (tidy.pure, "billing/money.py", "import os.path\nimport time", [(1, "os.path"), (2, "time")]),
    (tidy.pure, "keys/api_key.py", "from asyncio import sleep", [(1, "asyncio.sleep")]),
    (tidy.pure, "gateway/protocols/chat.py", "import urllib.request", [(1, "urllib.request")]),
    (tidy.pure, "billing/quote.py", "from billing import book", [(1, "billing.book, which is")]),
    (tidy.pure, "billing/usage.py", "async def f(): pass", [(1, "f is async")]),
    (tidy.pure, "billing/prices.py", "open('x')\ndatetime.now(UTC)", [(1, "open"), (2, ".now()")]),
    (tidy.no_float, "billing/a.py", "def f(x: float): ...", [(1, "the name float")]),
    (tidy.no_float, "billing/a.py", "x = 1\ny = 1e3", [(2, "literal 1000.0")]),
    (tidy.no_float, "billing/chain/a.py", "a / b\na /= b", [(1, "operator /"), (2, "operator /")]),
    (tidy.no_http_in_billing, "billing/book.py", "import httpx", [(1, "httpx")]),
    (tidy.no_http_in_billing, "billing/a.py", "from http import HTTPStatus", [(1, "HTTPStatus")]),
    (
        tidy.no_catch_all,
        "keys/a.py",
        "try:\n    x\nexcept Exception:\n    raise",
        [(3, "Exception")],
    ),
    (tidy.no_catch_all, "keys/a.py", SWALLOWS, [(4, "BaseException")]),
    (tidy.no_catch_all, "keys/a.py", "try:\n    x\nexcept:\n    raise", [(3, "bare except")]),
    (
        tidy.no_catch_all,
        "keys/a.py",
        "try:\n    x\nexcept (OSError, Exception):\n    x\nwith contextlib.suppress(Exception): x",
        [(3, "(OSError, Exception)"), (5, "suppress(Exception)")],
    ),
    (tidy.no_bare_task, "keys/a.py", "asyncio.create_task(f())", [(1, "create_task")]),
    (tidy.no_bare_task, "keys/a.py", "t = get_running_loop().create_task(f())", [(1, "task")]),
    (tidy.no_bare_task, "keys/a.py", f"{GROUP}\nensure_future(f())", [(7, "ensure_future")]),
    (tidy.no_print, "gateway/cli/a.py", "print('hello')", [(1, "no-print")]),
    (tidy.no_environ, "config/a.py", "import os\nx = os.environ['A']", [(2, "os.environ")]),
    (tidy.no_environ, "gateway/a.py", "from os import getenv", [(1, "os.getenv")]),
    (tidy.lua, "billing/lua/a.lua", "-- a\n#!lua\n", [(1, "begins with #!lua")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nlocal s = tostring(x)", [(2, "tostring")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nlocal s = 'a'\n  .. b", [(3, ".. loses digits")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nf('a' --[[ b\n]] .. c)", [(3, ".. loses digits")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nf(-tonumber(x))", [(2, "write 0 - x")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nf(a, - tonumber(x))", [(2, "write 0 - x")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nreturn -held", [(2, "write 0 - x")]),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nf('-- not money' .. x)", [(2, ".. loses digits")]),
]

GOOD: list[tuple[Rule, str, str]] = [
    (tidy.file_size, "keys/a.py", "x = 1\n" * 400),
    (tidy.function_size, "keys/a.py", LONG_FUNCTION.removesuffix("    x = 1\n")),
    (tidy.nesting, "keys/a.py", DEEP_ENOUGH),
    (tidy.import_direction, "gateway/services.py", "import billing, config, keys, migrations"),
    (tidy.import_direction, "migrations/runner.py", "from config import settings"),
    (tidy.import_direction, "tests/a.py", "import gateway, bench, tests"),
    (tidy.import_direction, "gateway/api/__init__.py", "from ..relay import pipeline"),
    (tidy.import_direction, "gateway/relay/pipeline.py", "from . import admit, settle"),
    (tidy.import_direction, "gateway/relay/admit.py", "from gateway.relay import facts"),
    (tidy.import_direction, "gateway/relay/forward.py", "from gateway.providers import http"),
    (tidy.import_direction, "gateway/protocols/chat.py", "from billing.usage import Usage"),
    (tidy.one_door, "gateway/embedded/deep/postgres.py", "import asyncpg, redis"),
    (tidy.one_door, "billing/till_link.py", "import hiredis, msgspec, json, billing.money"),
    (tidy.pure, "billing/quote.py", "from billing.money import price_of\nimport config.settings"),
    (tidy.pure, "billing/book.py", "import asyncio, os, time"),
    (tidy.no_float, "billing/a.py", "def f(x: int, /): return x // 2 % 3"),
    (tidy.no_float, "gateway/metrics.py", "x: float = 1.0 / 3"),
    (tidy.no_http_in_billing, "billing/chain/rpc.py", "import httpx"),
    (tidy.no_catch_all, "gateway/edge.py", "try:\n    x\nexcept Exception:\n    x"),
    (tidy.no_catch_all, "keys/a.py", CLEANUP),
    (tidy.no_bare_task, "keys/a.py", GROUP),
    (tidy.no_bare_task, "gateway/supervise.py", "asyncio.create_task(f())"),
    (tidy.no_print, "keys/a.py", "log.print('x')"),
    (tidy.no_environ, "gateway/cli/main.py", "import os\nos.environ['A']"),
    (tidy.no_environ, "gateway/a.py", "settings.environ"),
    (tidy.lua, "billing/lua/a.lua", "#!lua\n-- a..b, tostring(x)\nf('a..b', \"-tonumber(\", ...)"),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nlocal k = 'fb:' .. slot -- not money"),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nlocal a = b - tonumber(c) - d[1] - (e)\nreturn -1"),
    (tidy.lua, "billing/lua/a.lua", "#!lua\nlocal s = [==[\n]] .. -x\n]==] --[[ -y .. z\n]]"),
]


@pytest.mark.parametrize("rule", tidy.RULES, ids=lambda rule: rule.__name__)
def test_the_tree_is_tidy(rule: Rule) -> None:
    found = tidy.check(rule, ROOT)

    assert not found, "\n" + "\n".join(map(str, found))


@pytest.mark.parametrize(("rule", "path", "text", "expected"), BAD)
def test_a_rule_finds_what_it_forbids(
    rule: Rule, path: str, text: str, expected: list[tuple[int, str]]
) -> None:
    found = sorted(rule(Source(path, text)))

    assert [violation.line for violation in found] == [line for line, _ in expected]
    for violation, (line, part) in zip(found, expected, strict=True):
        assert str(violation).startswith(f"{path}:{line} ")
        assert part in violation.rule


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_a_rule_lets_the_rest_pass(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


def test_every_rule_is_tried_on_both_sides() -> None:
    assert {rule for rule, *_ in BAD} == set(tidy.RULES)
    assert {rule for rule, *_ in GOOD} == set(tidy.RULES)


def test_every_exception_has_a_reason() -> None:
    tables = (
        tidy_tables.FLOAT_IN_BILLING,
        tidy_tables.HTTP_IN_BILLING,
        tidy_tables.CATCHES_ALL,
        tidy_tables.OWNS_TASKS,
        tidy_tables.READS_ENVIRON,
    )

    assert all(len(reason.split()) > 2 for table in tables for reason in table.values())


def test_a_tree_of_files_is_read_as_the_rules_expect(tmp_path: Path) -> None:
    (tmp_path / "billing/lua").mkdir(parents=True)
    (tmp_path / "billing/book.py").write_text("x = 0.5\n")
    (tmp_path / "billing/lua/admit_v1.lua").write_text("return 1\n")

    assert [str(v) for rule in tidy.RULES for v in tidy.check(rule, tmp_path)] == [
        "billing/book.py:1 no-float: the literal 0.5",
        "billing/lua/admit_v1.lua:1 lua: begins with #!lua",
    ]
