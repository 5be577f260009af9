"""The limit that counts is the least one, of either kind of control group."""

from pathlib import Path

import psutil
import pytest

from gateway.memory import give_back, limit_bytes, resident_bytes

GIB = 1024**3


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc/self and a /sys/fs/cgroup."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": f"{GIB}\n"}, GIB),
        # The group above has the tighter limit.
        (
            {
                "proc/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/memory.max": f"{GIB // 2}\n",
            },
            GIB // 2,
        ),
        # A container sees its own group as the root, whatever it is called outside.
        (
            {"proc/cgroup": "0::/../../x\n", "cgroup/memory.max": f"{GIB}\n"},
            GIB,
        ),
        (
            {
                "proc/cgroup": "9:cpu,memory:/c\n0::/\n",
                "cgroup/memory/c/memory.limit_in_bytes": f"{GIB}\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            GIB,
        ),
    ],
    ids=["v2", "v2 parent", "v2 container", "v1"],
)
def test_the_least_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert limit_bytes(*write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/cgroup": "0::/a\n", "cgroup/a/memory.max": "max\n"},
        {"proc/cgroup": "4:cpu:/c\n", "cgroup/memory/c/memory.limit_in_bytes": "1\n"},
    ],
    ids=["no proc", "no limit", "another controller"],
)
def test_without_a_limit_it_is_the_memory_of_the_machine(
    tmp_path: Path, files: dict[str, str]
) -> None:
    assert limit_bytes(*write(tmp_path, files)) == psutil.virtual_memory().total


@pytest.mark.skipif(not psutil.LINUX, reason="needs /proc")
def test_the_resident_memory_is_what_the_system_says() -> None:
    give_back()
    found, told = resident_bytes(), psutil.Process().memory_info().rss

    assert abs(found - told) < told // 10


def test_what_cannot_be_read_is_no_memory(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path) == 0
