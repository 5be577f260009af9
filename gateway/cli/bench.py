"""`farebox bench`: what the gateway costs, measured beside the same calls without it.

Exit codes: 0 measured, 1 the run does not count (receipts, drift, errors, a late generator),
2 wrong arguments, 99 a gate was missed.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli.context import end

if TYPE_CHECKING:
    from bench.arms import Arm
    from bench.gates import Gate
    from bench.report import Report
    from bench.runner import Options

EXIT_FAILED, EXIT_USAGE, EXIT_GATE, EXIT_STOPPED = 1, 2, 99, 130
QUICK_BUDGET_S = 80.0

Command = Callable[..., Any]


@click.group()
def bench() -> None:
    """Measure the gateway: CPU, added latency, memory; receipts compared with what was served."""


def output_options(command: Command) -> Command:
    """Where the result goes, and which gates it has to pass."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="The whole report on stdout."),
        click.option("--save", type=click.Path(path_type=Path), help="The report as JSON, here."),
        click.option("--html", type=click.Path(path_type=Path), help="One page with plots, here."),
        click.option(
            "--fail-if",
            multiple=True,
            metavar="GATE",
            help="Exit 99 if true, e.g. 'cpu_us_per_request>250'.",
        ),
    ):
        command = option(command)
    return command


@bench.command()
@click.option("--seconds", type=click.FloatRange(0.2, 10), default=1.2, show_default=True)
@click.option("--load", "loads", multiple=True, metavar="NAME", help="Only this load (repeat).")
@output_options
def quick(seconds: float, loads: Sequence[str], **output: Any) -> None:
    """All that matters in less than 90 seconds, without any set-up."""
    from bench.loads import QUICK
    from bench.runner import Options

    gates = _gates(output["fail_if"])
    options = Options(
        loads=_known(loads or QUICK),
        rounds=2,
        seconds=seconds,
        warm_s=min(0.4, seconds),
        budget_s=QUICK_BUDGET_S,
    )
    _finish(_measure(options), gates, output)


@bench.command("run")
@click.option("--load", "loads", multiple=True, metavar="NAME", help="Only this load (repeat).")
@click.option("--rounds", type=click.IntRange(1, 50), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.2, 300), default=3.0, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0), default=0.0, help="Arrivals/s; 0: half of the lowest peak."
)
@click.option(
    "--rates", default="0.5,1,1.5", show_default=True, help="Shares of that rate, for the curve."
)
@click.option("--loaders", type=click.IntRange(1, 16), default=1, help="Processes that make load.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, help="Of the gateway.")
@click.option("--pin", is_flag=True, help="A processor for each worker of ours.")
@click.option("--seed", type=click.IntRange(0), default=1)
@click.option("--mock-port", type=click.IntRange(0, 65535), default=0, help="For peers; 0: a free.")
@click.option("--no-gateway", is_flag=True, help="Only direct and the peers.")
@click.option("--peer", "peers", multiple=True, metavar="NAME=URL", help="One more arm (repeat).")
@click.option("--peer-key", "keys", multiple=True, metavar="NAME=KEY", help="Or NAME=@FILE.")
@click.option("--peer-model", "models", multiple=True, metavar="NAME=MODEL")
@click.option("--peer-pid", "pids", multiple=True, metavar="NAME=PID", help="To account its CPU.")
@output_options
def run_command(**given: Any) -> None:
    """The long measurement, with other gateways beside ours if you like."""
    from bench.loads import DEFAULT
    from bench.runner import Options

    gates = _gates(given["fail_if"])
    options = Options(
        loads=_known(given["loads"] or DEFAULT),
        peers=_peers(given),
        rates=_shares(given["rates"]),
        with_gateway=not given["no_gateway"],
        **{
            name: given[name]
            for name in (
                "rounds",
                "seconds",
                "rate",
                "loaders",
                "workers",
                "pin",
                "seed",
                "mock_port",
            )
        },
    )
    _finish(_measure(options), gates, given)


@bench.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--fail-if", multiple=True, metavar="GATE", help="'cpu_us_per_request>+10%'")
@click.option("--arm", default="gateway", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The outcome of every gate on stdout.")
def compare(before: Path, after: Path, fail_if: Sequence[str], arm: str, as_json: bool) -> None:
    """Two reports beside each other."""
    from bench.table import comparison_of

    gates = _gates(fail_if)
    old, new = _read(before), _read(after)
    if not as_json:
        click.echo(comparison_of(old, new, arm))
    _judge(gates, new, old, arm, as_json=as_json)


@bench.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="One page with plots, here.")
def report(report: Path, html: Path | None) -> None:
    """Show a saved report again."""
    from bench.page import page_of
    from bench.table import table_of

    found = _read(report)
    click.echo(table_of(found))
    if html is not None:
        _write(html, page_of(found).encode())


@bench.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mock(arguments: tuple[str, ...]) -> None:
    """Only the mock upstream, for other gateways and other load tools; --help tells its options."""
    from bench import mock as mock_process

    mock_process.main(arguments)


@bench.command("hot-path")
@click.option("--check", is_flag=True, help="Exit 99 when a stage costs twice what it did.")
@click.option("--record", is_flag=True, help="Keep these ratios as the ones to compare with.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def hot_path(check: bool, record: bool, as_json: bool) -> None:
    """CPU of each stage of a request alone, as a ratio to a fixed loop of the same run."""
    from bench import hot_path as stages

    sys.exit(stages.main(check=check, record=record, as_json=as_json, say=click.echo))


def _known(names: Sequence[str]) -> list[str]:
    from bench.loads import LOADS

    for name in names:
        if name not in LOADS:
            end(EXIT_USAGE, f"--load {name}: there are {', '.join(LOADS)}")
    return list(names)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        end(EXIT_USAGE, f"--rates {text}: write numbers like 0.5,1,1.5")
    if any(not 0 < share <= 10 for share in shares):
        end(EXIT_USAGE, f"--rates {text}: shares are above 0 and at most 10")
    return sorted({1.0, *shares})


def _peers(given: dict[str, Any]) -> list["Arm"]:
    from bench.arms import arm_at, watched
    from bench.loads import MODEL
    from bench.processes import ChildFailed

    keys, models, pids = (_pairs(given[name]) for name in ("keys", "models", "pids"))
    peers = []
    for name, url in _pairs(given["peers"]).items():
        try:
            key = keys.get(name, "")
            if key.startswith("@"):
                key = Path(key[1:]).read_text("utf-8").strip()
            arm = arm_at(name, url, key, models.get(name, MODEL))
            if name in pids:
                watched(arm, int(pids[name]))
        except (ValueError, OSError, ChildFailed) as exc:
            end(EXIT_USAGE, f"--peer {name}: {exc}")
        peers.append(arm)
    names = {"direct", "gateway"} & {arm.name for arm in peers}
    if names:
        end(EXIT_USAGE, f"--peer: {', '.join(names)} is an arm of ours, take another name")
    return peers


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            end(EXIT_USAGE, f"{text}: write NAME=VALUE")
        pairs[name] = value
    return pairs


def _gates(texts: Sequence[str]) -> list["Gate"]:
    from bench.gates import GateError, read_gate

    try:
        return [read_gate(text) for text in texts]
    except GateError as exc:
        end(EXIT_USAGE, str(exc))


def _measure(options: "Options") -> "Report":
    """Run with a bar on stderr; Ctrl-C and SIGTERM stop everything that was started."""
    from bench.processes import ChildFailed
    from bench.runner import planned_s, run
    from billing.errors import BillingError
    from gateway.embedded.errors import StoreError

    if sys.platform != "linux":
        end(EXIT_FAILED, "the bench reads /proc: it runs on Linux only")

    async def work() -> "Report":
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with _bar(planned_s(options)) as progress:
            return await run(options, progress)

    try:
        return asyncio.run(work())
    except (KeyboardInterrupt, asyncio.CancelledError):
        end(EXIT_STOPPED, "stopped")
    except (ChildFailed, StoreError, BillingError, OSError) as exc:
        end(EXIT_FAILED, f"{exc} {getattr(exc, 'reason', '')}".rstrip())


@contextmanager
def _bar(total_s: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on stderr, fed with the seconds that the next step takes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
    with bar:
        task = bar.add_task("", total=total_s)
        under_way = 0.0

        def progress(seconds: float, text: str) -> None:
            nonlocal under_way
            bar.update(task, advance=under_way, description=text)
            under_way = seconds

        yield progress


def _finish(made: "Report", gates: "Sequence[Gate]", output: dict[str, Any]) -> None:
    from bench.files import to_json
    from bench.page import page_of
    from bench.table import table_of

    data = to_json(made)
    if output["save"] is not None:
        _write(output["save"], data)
    if output["html"] is not None:
        _write(output["html"], page_of(made).encode())
    click.echo(data.decode() if output["as_json"] else table_of(made))
    if made.failures or made.void:
        end(EXIT_FAILED, *made.failures, *made.void)
    _judge(gates, made, None, "gateway", as_json=False)


def _judge(
    gates: "Sequence[Gate]", new: "Report", old: "Report | None", arm: str, *, as_json: bool
) -> None:
    """Say how every gate went; exit 99 when one was missed."""
    import msgspec

    from bench.gates import GateError, judge

    try:
        outcomes = judge(gates, new, old, arm)
    except GateError as exc:
        end(EXIT_USAGE, str(exc))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcomes)).decode())
    missed = [outcome for outcome in outcomes if outcome.is_missed]
    for outcome in missed:
        said = f"{outcome.load}: {outcome.now:.6g}, limit {outcome.limit:.6g}"
        click.echo(f"farebox: missed {outcome.gate} at {said}", err=True)
    if missed:
        sys.exit(EXIT_GATE)


def _read(path: Path) -> "Report":
    from bench.files import NoReport, read_report

    try:
        return read_report(path)
    except (NoReport, OSError) as exc:
        end(EXIT_USAGE, str(exc))


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as exc:
        end(EXIT_FAILED, f"{os.fspath(path)}: {exc.strerror}")
