"""The randomized campaign: kill, empty, cut and stop parts of the system; the money adds up.

The default is a few runs; `-m faults tests/faults --runs N --seed S` does N of them, and
`--only K` repeats the run of that number alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import campaign, table
from tests.faults.world import running_world
from tests.support.upstream.launch import Upstream

RUNS_DEFAULT = 6
SEED_DEFAULT = 20_261_126

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="kills and descriptors as Linux has them"),
]


@pytest.mark.timeout(0)
async def test_nothing_is_lost_minted_or_overcharged_whatever_is_killed(
    request: pytest.FixtureRequest, tmp_path: Path, upstream: Upstream
) -> None:
    option = request.config.getoption
    runs, seed, only = option("--runs"), option("--seed"), option("--only")
    is_long = runs is not None or only is not None
    seed = SEED_DEFAULT if seed is None else seed
    numbers = [only] if only is not None else range(runs or RUNS_DEFAULT)
    plugin: Callable[[str], Any] = request.config.pluginmanager.get_plugin

    def tell(line: str) -> None:
        with plugin("capturemanager").global_and_fixture_disabled():
            plugin("terminalreporter").write_line(line)

    async with running_world(tmp_path, upstream) as world:
        tally = await campaign(world, seed, numbers, tell if is_long else lambda _: None)
    if is_long:
        for line in ("", *table(tally)):
            tell(line)

    assert not tally.failures, "\n".join(tally.failures)
    assert tally.runs == len(numbers)
    assert (tally.lost, tally.minted, tally.overcharged) == (0, 0, 0)
