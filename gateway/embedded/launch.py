"""Become a server that cannot outlive its parent.

Run as `python -I -S launch.py PARENT_PID IDENTITY STOP_SIGNAL FOLDER COMMAND...`: a process of its
own does what a preexec_fn would: Python in the fork of a threaded parent is not safe.
`launch.py probe` exits 0 where a user namespace is allowed. Standard library only, never imported.

Failure: one line on stderr (the server's log) and exit code 1; COMMAND was then not run.
"""

import contextlib
import ctypes
import os
import pwd
import signal
import sys

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
CAP_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1
NOBODY = 65534


def main(argv: list[str]) -> None:
    if argv == ["probe"]:
        enter_user_namespace()
        return
    parent, identity, stop_signal, folder, *command = argv
    reset_signals()
    os.umask(0o077)
    if identity == "userns":
        enter_user_namespace()
    elif identity == "nobody":
        become_nobody(folder, command[0])
    if closed := closed_folder(folder, command[0]):
        sys.exit(
            f"launch: uid {os.getuid()} ({identity}) may not enter {closed}. Postgres refuses root:"
            " run farebox as a normal user, or keep it and its data where everybody may enter."
        )
    # The kernel clears the death signal when credentials change, so it comes after them.
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, int(stop_signal), 0, 0, 0)
    # A parent that died before prctl sends nothing: without this the server would stay for ever.
    if os.getppid() != int(parent):
        sys.exit("launch: the parent has gone")
    os.execv(command[0], command)  # noqa: S606 - becoming this program is the purpose


def reset_signals() -> None:
    """Undo what Python or a shell left ignored or blocked: exec would pass it on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def enter_user_namespace() -> None:
    """Look like another user to ourselves only: postgres refuses root, initdb the nameless."""
    uid, gid, seen_as = os.geteuid(), os.getegid(), named_user()
    call("unshare", CLONE_NEWUSER)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{seen_as} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def named_user() -> int:
    """A uid with a name: 65534, or in an image without `nobody` any other but root."""
    names = {entry.pw_uid for entry in pwd.getpwall()} - {0}
    return NOBODY if NOBODY in names else min(names, default=NOBODY)


def become_nobody(*needed: str) -> None:
    """Give up root, and all of its rights unless needed paths stand in a folder closed to others.

    Root's home is such a folder. Then the right to pass permission checks stays, if we have it;
    even so the server may do less than in a user namespace, where root's files are its own.
    """
    if sys.platform == "linux":
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if sys.platform == "linux" and closed_folder(*needed):
        with contextlib.suppress(OSError):  # the caller looks again and names the folder
            keep_file_access()


def keep_file_access() -> None:
    right = 1 << CAP_DAC_OVERRIDE
    header = (ctypes.c_uint32 * 2)(CAP_VERSION_3, 0)
    # effective, permitted, inheritable: of the rights 0-31, then of the rights 32-63
    data = (ctypes.c_uint32 * 6)(right, right, right, 0, 0, 0)
    if ctypes.CDLL(None).capset(header, data) == 0:
        call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0)


def closed_folder(*paths: str) -> str | None:
    """The first folder on the way to paths that this process may not enter, or None."""
    for path in paths:
        names = path.split("/")[1:-1]
        for depth in range(len(names) + 1):
            folder = "/" + "/".join(names[:depth])
            try:
                os.stat(f"{folder}/.")
            except PermissionError:
                return folder
    return None


def call(name: str, *arguments: int) -> None:
    """Call libc with unsigned long arguments; prctl reads all five."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*map(ctypes.c_ulong, arguments)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as exc:
        sys.exit(f"launch: {exc}")
