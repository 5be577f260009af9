"""Whom the servers run as. Creates no user and opens no folder to everybody.

Postgres refuses to run as root. A root parent gives it a user namespace of its own, where files
still belong to root, or, where namespaces are refused (most containers), uid 65534. initdb refuses
users without a name (`docker run --user 12345`): they get a namespace too, in which they have one.
"""

import enum
import functools
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launch.py")
NOBODY = 65534


class Identity(enum.StrEnum):
    SAME = "same"
    """The user of the parent: the parent is not root."""
    USERNS = "userns"
    """Another uid inside a user namespace; files belong to the parent's user."""
    NOBODY = "nobody"
    """Uid and gid 65534; what the server writes belongs to them."""

    @property
    def uid(self) -> int:
        return NOBODY if self is Identity.NOBODY else os.geteuid()

    @property
    def gid(self) -> int:
        return NOBODY if self is Identity.NOBODY else os.getegid()


@functools.cache
def usual_identity() -> Identity:
    """The best this machine allows; tries it once in a process of its own where it matters."""
    otherwise = Identity.SAME if os.geteuid() else Identity.NOBODY
    if sys.platform != "linux" or (os.geteuid() and has_name(os.geteuid())):
        return otherwise
    probe = subprocess.run(
        [sys.executable, "-I", "-S", str(LAUNCHER), "probe"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        check=False,
    )
    return Identity.USERNS if probe.returncode == 0 else otherwise


def has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def hand_over(folder: Path, identity: Identity) -> None:
    """Give folder and everything in it to identity, the folder itself last.

    So a hand-over that was cut short is repeated: the identity may change between two runs.
    """
    if identity is Identity.SAME or folder.stat().st_uid == identity.uid:
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), identity.uid, identity.gid, follow_symlinks=False)
    os.chown(folder, identity.uid, identity.gid)


def let_through(folder: Path, identity: Identity) -> None:
    """Let identity pass through a folder of ours without letting it list or read anything there."""
    if identity is Identity.NOBODY and not folder.stat().st_mode & stat.S_IXOTH:
        os.chown(folder, -1, identity.gid)
        folder.chmod(0o710)
