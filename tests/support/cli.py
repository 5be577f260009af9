"""The command line inside the test's process, on stores that run already."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from gateway.__main__ import main

TABLES = """
[keys]
mode = "test"
[providers.zoo]
kind = "openai"
base_url = "{upstream_url}"
[providers.echo]
kind = "echo"
[models.plain]
routes = [{{ provider = "zoo" }}]
[models.echo]
routes = [{{ provider = "echo" }}]
"""


class Cli:
    """Commands with the same config and environment."""

    def __init__(self, folder: Path, upstream_url: str, **environ: str) -> None:
        self.environ: Mapping[str, str] = {f"FAREBOX_{name}": environ[name] for name in environ}
        self._config = folder / "farebox.toml"
        self._config.write_text(TABLES.format(upstream_url=upstream_url))
        self._folder = folder

    async def run(self, *args: str, stdin: str = "") -> tuple[int, str, str]:
        """(exit code, stdout, stderr). In a thread: commands have an event loop of their own."""
        runner = CliRunner(env=self.environ)
        where = ["--config", str(self._config), "--data-dir", str(self._folder)]
        done = await asyncio.to_thread(runner.invoke, main, [*args, *where], input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    async def json(self, *args: str, stdin: str = "") -> Any:
        """What a command that succeeds says."""
        code, out, err = await self.run(*args, "--json", stdin=stdin)
        assert code == 0, err
        return json.loads(out)
