"""Run real client SDKs, each in an environment of its own, against a gateway.

    python tests/clients/run.py --base-url http://127.0.0.1:8080/v1 --api-key KEY

Standard library only; needs uv, and npm for the Node client. Installed environments are kept in
the cache folder and made again when their lock file changes. Exit status 1 on any failure.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks import CASES, failures_of

HERE = Path(__file__).resolve().parent
INSTALL_TIMEOUT_S = 300
RUN_TIMEOUT_S = 120


class ClientFailed(Exception):
    """A client could not be installed or did not print its report."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """One SDK: `lock` decides about the environment, `prepare` makes it, `command` runs it."""

    name: str
    folder: str
    lock: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], list[str]]


def main() -> int:
    options = _options()
    task = {
        "base_url": options.base_url,
        "api_key": options.api_key,
        "model": options.model,
        "bad_key": "sk-farebox-of-nobody",
        "unknown_model": "no-such-model",
    }
    reports, failures = [], {}
    for client in CLIENTS:
        if options.only and client.name not in options.only:
            continue
        try:
            report = _run(client, options.cache, task)
        except ClientFailed as exc:
            failures[client.name] = {"run": [str(exc)]}
            continue
        reports.append(report)
        failures[client.name] = failures_of(report["cases"], plain=options.plain)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=2) + "\n")
    _table(reports, failures)
    return 1 if not reports or any(failures.values()) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", required=True, help="ends in /v1")
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--model", default="echo")
    parser.add_argument(
        "--plain", action="store_true", help="any OpenAI-compatible server: no receipts, no costs"
    )
    parser.add_argument("--only", action="append", choices=[client.name for client in CLIENTS])
    parser.add_argument("--json", type=Path, help="write everything the clients saw to this file")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farebox-clients"
    parser.add_argument("--cache", type=Path, default=default, help="where environments are kept")
    return parser.parse_args()


def _run(client: Client, cache: Path, task: dict[str, str]) -> dict[str, Any]:
    place = _environment(client, cache)
    for script in (HERE / client.folder).iterdir():
        if script.is_file():
            shutil.copy2(script, place)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "PYTHON"))}
    text = _call(
        client.command(place), place, {**clean, "CLIENT_TASK": json.dumps(task)}, RUN_TIMEOUT_S
    )
    try:
        return dict(json.loads(text.splitlines()[-1]))
    except (ValueError, IndexError) as exc:
        raise ClientFailed(f"no report in {text[-300:]!r}") from exc


def _environment(client: Client, cache: Path) -> Path:
    """The folder with the installed SDK; only a finished one has the marker."""
    lock = (HERE / client.folder / client.lock).read_bytes()
    digest = hashlib.sha256(lock + sys.version.encode()).hexdigest()[:12]
    place = cache / f"{client.folder}-{digest}"
    marker = place / "installed"
    if not marker.exists():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(
            HERE / client.folder, place, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
        client.prepare(place)
        marker.touch()
    return place


def _prepare_python(place: Path) -> None:
    environment = dict(os.environ)
    _call([_tool("uv"), "venv", "--python", sys.executable, "env"], place, environment)
    install = [_tool("uv"), "pip", "install", "--python", "env/bin/python"]
    _call([*install, "-r", "requirements.txt"], place, environment)


def _prepare_node(place: Path) -> None:
    command = [_tool("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    _call(command, place, dict(os.environ))


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ClientFailed(f"{name} is not installed")
    return found


def _call(
    command: list[str], place: Path, environment: dict[str, str], timeout: float = INSTALL_TIMEOUT_S
) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=place,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=True,
        )
    except subprocess.TimeoutExpired as exc:
        raise ClientFailed(f"{Path(command[0]).name}: nothing after {timeout:.0f} s") from exc
    except subprocess.CalledProcessError as exc:
        raise ClientFailed(f"{Path(command[0]).name}: {exc.stderr.strip()[-1500:]}") from exc
    return done.stdout


def _table(reports: list[dict[str, Any]], failures: dict[str, dict[str, list[str]]]) -> None:
    """Print a row a client and a column a case, then why each failure is one."""
    versions = {report["client"]: report["version"] for report in reports}
    out = sys.stdout.write
    out(f"{'client':<20} {'version':<9} " + " ".join(f"{case:<20}" for case in CASES) + "\n")
    for name, wrong in failures.items():
        cells = ["not run" if "run" in wrong else ("FAIL" if c in wrong else "ok") for c in CASES]
        row = " ".join(f"{cell:<20}" for cell in cells)
        out(f"{name:<20} {versions.get(name, '-'):<9} {row}\n")
    for name, wrong in failures.items():
        for case, reasons in wrong.items():
            out("".join(f"{name} {case}: {reason}\n" for reason in reasons))


CLIENTS = (
    Client(
        name="openai-python",
        folder="python",
        lock="requirements.txt",
        prepare=_prepare_python,
        command=lambda place: [str(place / "env/bin/python"), "sync_client.py"],
    ),
    Client(
        name="openai-python-async",
        folder="python",
        lock="requirements.txt",
        prepare=_prepare_python,
        command=lambda place: [str(place / "env/bin/python"), "async_client.py"],
    ),
    Client(
        name="openai-node",
        folder="node",
        lock="package-lock.json",
        prepare=_prepare_node,
        command=lambda place: [_tool("node"), "client.mjs"],
    ),
)


if __name__ == "__main__":
    sys.exit(main())
