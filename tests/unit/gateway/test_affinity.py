"""Which processors the workers get, and that they are where they belong."""

import os

import pytest

from gateway.affinity import Places, allowed_cpus, move, places_for

needs_linux = pytest.mark.skipif(not allowed_cpus(), reason="needs Linux: processor affinity")


@pytest.mark.parametrize(
    ("workers", "allowed", "expected"),
    [
        (1, {0, 1}, Places((0,), (1,))),
        (2, {7, 3, 5}, Places((3, 5), (7,))),
        (1, {4}, Places()),
        (2, {0, 1}, Places()),
        (1, set(), Places()),
    ],
)
def test_workers_come_first_and_something_is_left(
    workers: int, allowed: set[int], expected: Places
) -> None:
    assert places_for(workers, allowed) == expected


def test_nobody_has_a_place_without_pinning() -> None:
    assert Places().of_worker(3) is None
    assert places_for(2, {1, 2, 3}).of_worker(1) == 2


@needs_linux
def test_a_move_keeps_to_the_processors_named_and_can_be_undone() -> None:
    before = allowed_cpus()
    try:
        move(0, {min(before)})
        assert allowed_cpus() == {min(before)}
        move(0, ())
        assert allowed_cpus() == {min(before)}
    finally:
        move(0, before)
    assert allowed_cpus() == before


@needs_linux
def test_a_processor_that_is_not_there_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = allowed_cpus()
    move(0, {100_000})

    assert allowed_cpus() == before
    assert [record.message for record in caplog.records] == ["workers.not_pinned"]


@needs_linux
def test_a_process_that_has_ended_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    move(pid, allowed_cpus())

    assert caplog.records == []
