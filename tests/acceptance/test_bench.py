"""`farebox bench` as its users run it: everything starts, counts, compares and stops."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from gateway.affinity import allowed_cpus
from gateway.cli.bench import bench
from tests.support.gateway import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

EXIT_GATE, EXIT_STOPPED, EXIT_USAGE = 99, 130, 2


async def started(folder: Path, *arguments: str) -> Process:
    # Neither may reach the gateway of the run: a bench never touches a real database.
    env = dict(os.environ) | {"FAREBOX_DATABASE_URL": "postgresql://nowhere:1/x"}
    env |= {"TMPDIR": str(folder)}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench",
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=folder,
    )


async def children_with(process: Process, module: str) -> list[psutil.Process] | None:
    """All processes of the run, once one of them runs this module."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        if any(module in child.cmdline() for child in children):
            return children
    return None


def left_over(folder: Path) -> list[Path]:
    return list(folder.glob("farebox-bench-*"))


async def test_a_tiny_quick_run_measures_bills_and_cleans_up(tmp_path: Path) -> None:
    loads = [part for name in ("burst-50", "mixed") for part in ("--load", name)]
    files = ["--save", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html")]
    process = await started(tmp_path, "quick", "--seconds", "0.3", *loads, *files)
    out, err = await asyncio.wait_for(process.communicate(), 90)
    report = json.loads((tmp_path / "run.json").read_text())

    assert report["failures"] == [], err.decode()
    # A machine that is busy with other tests may make the generator late: then it says so.
    assert process.returncode == (1 if report["void"] else 0), err.decode()
    assert (report["audit_violations"], report["drift_nanos"]) == (0, 0)
    for load in ("burst-50", "mixed"):
        check(next(f for f in report["figures"] if (f["load"], f["arm"]) == (load, "gateway")))
    assert b"CPU us/request" in out
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    assert left_over(tmp_path) == []


def check(figures: dict[str, Any]) -> None:
    """One load through the gateway."""
    assert figures["receipts"] == figures["served"] > 10
    assert 10 < figures["cpu_us_per_request"] < 1_000_000
    assert figures["rss_mib"] > 10
    assert figures["requests_per_s"] > 1
    if figures["load"] == "burst-50":
        assert 1 < figures["cpu_us_per_chunk"] < figures["cpu_us_per_request"]


@pytest.mark.parametrize(
    ("number", "while_there_is"),
    [(signal.SIGINT, "bench.mock"), (signal.SIGTERM, "bench.load")],
)
async def test_a_run_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: int, while_there_is: str
) -> None:
    process = await started(tmp_path, "quick", "--load", "chat-1k")
    children = await eventually(lambda: children_with(process, while_there_is), 60)
    process.send_signal(number)
    await asyncio.wait_for(process.communicate(), 60)

    assert process.returncode == EXIT_STOPPED
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert left_over(tmp_path) == []


OF_A_RUN = ("gateway.worker", "bench.mock", "bench.load", "postgres", "valkey-server")


def processors_of(child: psutil.Process) -> dict[str, set[int]]:
    """By the name of what it is; nothing for the rest and for what has just ended."""
    try:
        line = " ".join(child.cmdline()[:4])
        return {name: os.sched_getaffinity(child.pid) for name in OF_A_RUN if name in line}
    except (psutil.NoSuchProcess, ProcessLookupError):
        return {}


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="needs Linux and two processors")
async def test_a_pinned_run_leaves_the_workers_processor_to_the_worker(tmp_path: Path) -> None:
    first, *rest = sorted(os.sched_getaffinity(0))
    wanted = {name: set(rest) for name in OF_A_RUN} | {"gateway.worker": {first}}
    process = await started(tmp_path, "run", "--pin", "--load", "chat-1k", "--seconds", "5")

    async def in_place() -> bool | None:
        found: dict[str, set[int]] = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            found |= processors_of(child)
        return True if found == wanted else None

    try:
        await eventually(in_place, 60)
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 60)


def saved(path: Path, cpu: float) -> str:
    """A report with one figure."""
    figures = {"load": "chat-1k", "arm": "gateway", "cpu_us_per_request": cpu}
    report = {
        "made_at": "",
        "environment": {"cpus": 2, "python": "3"},
        "options": {},
        "figures": [figures],
        "audit_violations": 0,
        "drift_nanos": 0,
        "failures": [],
        "void": [],
    }
    path.write_text(json.dumps(report))
    return str(path)


@pytest.mark.parametrize(
    ("gate", "status"),
    [
        ("cpu_us_per_request>+10%", EXIT_GATE),
        ("cpu_us_per_request>+30%", 0),
        ("cpu_us_per_request>110", EXIT_GATE),
        ("cpu_us_per_chunk>1", EXIT_USAGE),
        ("nonsense", EXIT_USAGE),
    ],
)
def test_compare_ends_with_99_when_a_gate_is_missed(tmp_path: Path, gate: str, status: int) -> None:
    a, b = saved(tmp_path / "a.json", 100.0), saved(tmp_path / "b.json", 120.0)
    done = CliRunner().invoke(bench, ["compare", a, b, "--fail-if", gate])

    assert done.exit_code == status, done.output
    if status != EXIT_USAGE:
        assert "+20.0%" in done.output


def test_a_saved_report_is_shown_again(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    path = saved(tmp_path / "a.json", 123.0)
    done = CliRunner().invoke(bench, ["report", path, "--html", str(page)])

    assert done.exit_code == 0
    assert "123.0" in done.output
    assert "123.0" in page.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["quick", "--load", "nothing"],
        ["run", "--peer", "other"],
        ["run", "--peer", "other=https://127.0.0.1:1/v1"],
        ["run", "--peer", "gateway=http://127.0.0.1:1/v1"],
        ["run", "--rates", "x"],
        ["compare", "/nonexistent/a", "/nonexistent/b"],
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(bench, arguments).exit_code == EXIT_USAGE
