"""Crash points: comment lines in the product that become a place to die while this hook is on.

`# crash-point: NAME` on a line of its own is a comment and compiles to nothing. After `install`
the modules of our packages are compiled from a text in which each such line counts a hit and, at
the hit that FAREBOX_CRASH_AT=NAME:N names, kills the process with SIGKILL: nothing is flushed,
nothing is closed. Hits are appended to the file FAREBOX_CRASH_HITS, one name a line.
"""

import builtins
import importlib.machinery
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[2]
PACKAGES = ("billing", "gateway", "keys")
POINT = re.compile(r"^( *)# crash-point: ([a-z]+(?:[.-][a-z]+)+)$", re.MULTILINE)
# Anything that looks like one: a misspelt line would be a comment for ever.
ALIKE = re.compile(r"crash[ _-]?point", re.IGNORECASE)
CALL = "__farebox_crash_point__"
CRASH_AT, HITS_FILE = "FAREBOX_CRASH_AT", "FAREBOX_CRASH_HITS"


def names_in(source: str) -> list[str]:
    return [found[2] for found in POINT.finditer(source)]


def with_calls(source: str) -> str:
    """The source with a call in place of each crash point; no line moves."""
    return POINT.sub(rf'\1{CALL}("\2")', source)


def product_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def find_points(files: Iterable[Path]) -> list[tuple[str, Path]]:
    return [(name, path) for path in files for name in names_in(path.read_text("utf-8"))]


class Death:
    """Counts hits and dies at the one that was named."""

    def __init__(self, crash_at: str, hits_file: str) -> None:
        name, _, count = crash_at.partition(":")
        self._name, self._count = name, int(count or 1)
        self._hits: Counter[str] = Counter()
        self._file = -1
        if hits_file:
            self._file = os.open(hits_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, name: str) -> None:
        self._hits[name] += 1
        if self._file >= 0:
            os.write(self._file, f"{name}\n".encode())
        if name == self._name and self._hits[name] == self._count:
            os.kill(os.getpid(), signal.SIGKILL)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed text, and neither reads nor writes what Python keeps compiled."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_source(fullname)
        return compile(with_calls(source or ""), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """From now on our packages are imported with their crash points. Nothing of them yet is."""
    early = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    assert not early, f"imported before the hook: {early}"
    sys.meta_path.insert(0, _Finder())
    arm("", "")


def arm(crash_at: str, hits_file: str) -> None:
    """Say where to die (nowhere: '') and where to count."""
    setattr(builtins, CALL, Death(crash_at, hits_file))


def arm_by_environment() -> None:
    """As FAREBOX_CRASH_AT and FAREBOX_CRASH_HITS of this process say."""
    arm(os.environ.get(CRASH_AT, ""), os.environ.get(HITS_FILE, ""))
