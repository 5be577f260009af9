"""Crash points: unique, known to the campaign, nothing at all without the hook, deadly with it."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import CodeType

import pytest

from tests.faults import crash
from tests.faults.points import POINTS

FILES = list(crash.product_files())
WITH_POINTS = sorted({path for _, path in crash.find_points(FILES)})
KILLED = """
import sys
from tests.faults import crash

crash.install()
crash.arm_by_environment()
import billing.settler
from gateway.relay import settle

point = getattr(__builtins__, crash.CALL)
for name in sys.argv[1:]:
    point(name)
sys.stdout.write("alive")
"""


def texts_of(code: CodeType) -> set[str]:
    """All names and strings of a module's byte code, nested functions included."""
    found = {*code.co_names, *code.co_varnames}
    for value in code.co_consts:
        if isinstance(value, CodeType):
            found |= texts_of(value)
        elif isinstance(value, str):
            found.add(value)
    return found


def run(*passed: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", KILLED, *passed]
    clean = {name: value for name, value in os.environ.items() if "FAREBOX" not in name}
    return subprocess.run(
        command, cwd=crash.ROOT, env={**clean, **env}, capture_output=True, text=True, check=False
    )


def test_every_name_of_a_crash_point_stands_in_one_place() -> None:
    counts = Counter(name for name, _ in crash.find_points(FILES))

    assert {name: count for name, count in counts.items() if count > 1} == {}


def test_the_campaign_knows_all_crash_points_and_no_others() -> None:
    assert {name for name, _ in crash.find_points(FILES)} == set(POINTS)
    assert len(POINTS) > 20


def test_nothing_looks_like_a_crash_point_and_is_none() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert len(crash.ALIKE.findall(text)) == len(crash.names_in(text)), path


@pytest.mark.parametrize("path", WITH_POINTS, ids=lambda path: path.stem)
def test_without_the_hook_the_byte_code_has_no_trace(path: Path) -> None:
    source = path.read_text("utf-8")
    code = compile(source, str(path), "exec")
    bare = compile(crash.POINT.sub("", source), str(path), "exec")

    assert code == bare
    texts = texts_of(code)
    assert crash.CALL not in texts
    assert not texts & set(crash.names_in(source))


@pytest.mark.parametrize("path", WITH_POINTS, ids=lambda path: path.stem)
def test_with_the_hook_every_crash_point_is_a_call_and_no_line_moves(path: Path) -> None:
    source = path.read_text("utf-8")
    changed = crash.with_calls(source)

    assert changed.count(f"{crash.CALL}(") == len(crash.names_in(source)) > 0
    assert changed.count("\n") == source.count("\n")
    assert set(crash.names_in(source)) <= texts_of(compile(changed, str(path), "exec"))


@pytest.mark.parametrize(
    "line",
    ["x = 1  # crash-point: a.b", "# crash-point: a", "# crash-point:a.b", "# crash point: a.b"],
)
def test_what_is_no_crash_point_stays_a_comment(line: str) -> None:
    assert crash.with_calls(f"{line}\n") == f"{line}\n"


def test_a_process_dies_at_the_hit_that_was_named_and_its_hits_survive(tmp_path: Path) -> None:
    hits = tmp_path / "hits"
    env = {crash.CRASH_AT: "a.b:2", crash.HITS_FILE: str(hits)}
    ended = run("a.b", "c.d", "a.b", "c.d", **env)

    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")
    assert hits.read_text().split() == ["a.b", "c.d", "a.b"]


def test_a_process_that_was_not_told_to_die_counts_and_lives(tmp_path: Path) -> None:
    hits = tmp_path / "hits"
    ended = run("a.b", "a.b", **{crash.HITS_FILE: str(hits)})

    assert (ended.returncode, ended.stdout) == (0, "alive"), ended.stderr
    assert hits.read_text().split() == ["a.b", "a.b"]


def test_the_hook_reaches_the_modules_of_the_product() -> None:
    script = "\n".join(
        [
            "from tests.faults import crash",
            "crash.install()",
            "from billing.settler import Settler",
            "from gateway.relay import settle",
            "assert crash.CALL in Settler.submit.__code__.co_names",
            "assert crash.CALL in settle.wait_settled.__code__.co_names",
        ]
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=crash.ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr


def test_the_switch_is_read_by_the_campaign_alone() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert crash.CRASH_AT not in text
        assert crash.HITS_FILE not in text
        assert "tests.faults" not in text
