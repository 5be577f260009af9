"""Ids: in order of time, one text for each, and nothing else is read as one."""

import json
import os
import pickle
import subprocess
import sys
import time
from copy import copy
from functools import reduce
from operator import and_, or_
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.ids import ALPHABET, id_text, new_id, read_id


@given(st.uuids())
def test_text_and_id_go_both_ways(uid: UUID) -> None:
    text = id_text(uid)

    assert len(text) == 26
    assert set(text) <= set(ALPHABET)
    assert read_id(text) == read_id(f"rcpt_{text}") == read_id(text.upper()) == uid


@given(st.uuids(), st.uuids())
def test_texts_sort_like_their_ids(one: UUID, other: UUID) -> None:
    assert (id_text(one) < id_text(other)) == (one < other)


def test_new_ids_are_version_7_and_differ() -> None:
    before = time.time_ns() // 10**6
    made = [new_id() for _ in range(10_000)]
    after = time.time_ns() // 10**6

    assert len(set(made)) == 10_000
    for uid in made:
        assert uid.version == 7
        assert uid.variant == "specified in RFC 4122"
        assert before <= uid.int >> 80 <= after


def test_every_random_bit_is_used_and_no_other() -> None:
    ends = [new_id().int & ((1 << 80) - 1) for _ in range(2000)]
    ones, noughts = reduce(or_, ends), reduce(and_, ends)
    rand_a, rand_b = ((1 << 12) - 1) << 64, (1 << 62) - 1

    assert ones ^ noughts == rand_a | rand_b
    assert noughts == 7 << 76 | 2 << 62


def test_a_made_id_is_like_any_other_uuid() -> None:
    made = new_id()
    same = UUID(str(made))

    assert (made, hash(made), repr(made)) == (same, hash(same), repr(same))
    assert pickle.loads(pickle.dumps(made)) == copy(made) == made  # noqa: S301


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_makes_ids_of_its_own() -> None:
    script = (
        "import os\nfrom config.ids import new_id\nnew_id()\npid = os.fork()\n"
        "made = [new_id().int & (1 << 62) - 1 for _ in range(500)]\n"
        # One after the other: a line is longer than what a pipe takes in one piece.
        "if pid: os.waitpid(pid, 0)\nprint(made, flush=True)\nif not pid: os._exit(0)\n"
    )
    root = str(Path(__file__).parents[2])
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True
    ).stdout
    one, other = (set(json.loads(line)) for line in said.splitlines())

    assert len(one) == len(other) == 500
    assert not one & other


def test_ids_of_later_milliseconds_are_larger() -> None:
    first = new_id()
    while time.time_ns() // 10**6 == first.int >> 80:
        pass

    assert new_id() > first


@pytest.mark.parametrize(
    "text",
    [
        *("", "_", "rcpt_", "0" * 25, "0" * 27, "w" + "0" * 25, "0" * 25 + "1", "0" * 25 + "v"),
        *(
            "0" * 25 + "\n",
            " " + "0" * 26,
            "0" * 26 + "_",
            "\u0660" * 26,
            "\u212a" + "0" * 25,
            "\u0130" * 13,
        ),
        *("-" + "0" * 25, "00000000-0000-0000-0000-000000000000", "0" * 1_000_000),
    ],
)
def test_no_id_of_ours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no id of ours") as caught:
        read_id(text)

    assert len(str(caught.value)) < 800


@given(st.text(max_size=40))
def test_any_text_is_an_id_or_a_value_error(text: str) -> None:
    try:
        uid = read_id(text)
    except ValueError:
        return
    assert id_text(uid) == text.rpartition("_")[2].lower()
