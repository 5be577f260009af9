"""Ids: in order of time, one text for each, and nothing else is read as one."""

import time
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
