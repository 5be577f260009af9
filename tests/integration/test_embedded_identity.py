"""Whom the servers run as: root in a namespace, uid 65534 where that is refused, a normal user."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway.embedded.identity import Identity, usual_identity
from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.valkey import EmbeddedValkey

FAST = {"fsync": "off"}
REPO = Path(__file__).parents[2]
NAMELESS = 12345
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
USER_RUN = """
import asyncio, os, pathlib, sys
from gateway.embedded.stores import open_stores

async def main():
    for _ in range(2):
        folder = pathlib.Path(sys.argv[1]) / "data"
        async with open_stores(folder, own=True, book_settings={"fsync": "off"}) as urls:
            owners = {os.stat(f"/proc/{pid}").st_uid for pid in urls.pids.values()}
            assert owners == {os.getuid()} != {0}, owners

asyncio.run(main())
print("both runs served")
"""
NOBODY_RUN = """
import asyncio, os, pathlib, sys
from gateway.embedded.identity import Identity
from gateway.embedded.valkey import EmbeddedValkey

async def main():
    valkey = EmbeddedValkey(pathlib.Path(sys.argv[1]), identity=Identity.NOBODY)
    await valkey.start()
    assert os.stat(f"/proc/{valkey.pid}").st_uid == 65534
    await valkey.stop()

asyncio.run(main())
print("nobody serves")
"""
# Root without CAP_DAC_OVERRIDE: exec computes its rights anew from the bounding set.
WITHOUT_FILE_ACCESS = """
import ctypes, os, sys
if len(sys.argv) == 2:
    assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0  # PR_CAPBSET_DROP
    again = open("/proc/self/cmdline", "rb").read().split(b"\\0")[:-1]
    os.execv(sys.executable, [*again, b"again"])
"""
# Root's Python may stand in a home that only root may enter. In a mount namespace of this process
# an open folder takes that home's place; nothing on the disk changes.
OPEN_AND_BECOME = """
import ctypes, os, sys
closed, uid, *rest = sys.argv[1:]
split = rest.index("--")
shown, command = rest[:split], rest[split + 1 :]
libc = ctypes.CDLL(None, use_errno=True)

def mount(source, target, kind, flags, options=None):
    if libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), options):
        sys.exit(77)

if closed:
    if libc.unshare(0x20000):  # CLONE_NEWNS
        sys.exit(77)
    mount("none", "/", None, 0x44000)  # MS_REC | MS_PRIVATE
    held = [(folder, os.open(folder, os.O_PATH)) for folder in shown]
    mount("tmpfs", closed, b"tmpfs", 0, b"mode=0755")
    for folder, handle in held:
        os.makedirs(folder, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", folder, None, 0x5000)  # MS_BIND | MS_REC
os.setgroups([])
os.setgid(int(uid))
os.setuid(int(uid))
os.execv(command[0], command)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """tmp_path is closed to other users, so that they cannot be tested in it."""
    folder = Path(tempfile.mkdtemp(prefix="farebox-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@NEEDS_ROOT
@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
async def test_nobody_serves_and_hands_the_folder_back(
    open_folder: Path, kind: type[EmbeddedPostgres | EmbeddedValkey]
) -> None:
    root = open_folder / "store"

    for identity in (Identity.NOBODY, usual_identity(), Identity.NOBODY):
        server = kind(root, settings=FAST if kind is EmbeddedPostgres else None, identity=identity)
        await server.start()
        assert psutil.Process(server.pid).uids().real == identity.uid
        assert (root / "data").stat().st_uid == identity.uid
        await server.stop()


@NEEDS_ROOT
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux")
@pytest.mark.parametrize(
    ("rights", "expected"), [("", "nobody serves\n"), (WITHOUT_FILE_ACCESS, "may not enter")]
)
def test_folder_closed_to_nobody_is_entered_or_named(
    tmp_path: Path, rights: str, expected: str
) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    program = rights + NOBODY_RUN
    root = tmp_path / "closed" / "store"

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(root)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert expected in done.stdout + done.stderr


@NEEDS_ROOT
@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux")
@pytest.mark.parametrize("uid", [65534, NAMELESS])
def test_normal_user_runs_both_twice(open_folder: Path, uid: int) -> None:
    if (hidden := barrier()) is None:
        pytest.skip(f"two folders hide Python from uid {uid}")
    os.chown(open_folder, uid, uid)
    shown = [str(path) for path in needed() if hidden and path.is_relative_to(hidden)]
    python = [sys.executable, "-W", "error", "-B", "-c", USER_RUN, str(open_folder)]

    done = subprocess.run(
        [sys.executable, "-c", OPEN_AND_BECOME, hidden, str(uid), *shown, "--", *python],
        cwd=REPO,
        env={"PATH": os.defpath, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    if done.returncode == 77:
        pytest.skip(f"{hidden} hides Python from uid {uid} and mounting over it is refused")
    assert done.stdout == "both runs served\n", done.stderr
    assert {path.stat().st_uid for path in open_folder.rglob("*")} == {uid}


def needed() -> list[Path]:
    """What a child Python reads: the interpreter, the environment, this repository."""
    return [Path(path).resolve() for path in (sys.base_prefix, sys.prefix, REPO)]


def barrier() -> str | None:
    """The one folder that hides any of it from others, "" when nothing does, None when several."""
    folders = {folder for path in needed() for folder in (path, *path.parents)}
    hidden = {str(folder) for folder in folders if not folder.stat().st_mode & stat.S_IXOTH}
    return None if len(hidden) > 1 else next(iter(hidden), "")


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's death signal is Linux")
def test_launcher_of_a_parent_that_has_gone_starts_nothing() -> None:
    launcher = REPO / "gateway" / "embedded" / "launch.py"
    gone = os.getpid() + 1
    command = [sys.executable, "-I", "-S", str(launcher), str(gone), "same", "15", "/", "/bin/echo"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    assert done.returncode == 1
    assert "the parent has gone" in done.stderr
    assert done.stdout == ""
