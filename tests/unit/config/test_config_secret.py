import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.secret import Secret


@given(st.text())
def test_a_secret_prints_as_stars_and_gives_its_value_only_when_asked(text):
    secret = Secret(text)

    assert (repr(secret), str(secret), f"{secret}") == ("***", "***", "***")
    assert secret.reveal() == text
    assert bool(secret) is (text != "")


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_secrets_are_equal_exactly_when_their_values_are(left, right):
    assert (Secret(left) == Secret(right)) is (left == right)
    assert Secret(left) == Secret(left)
    assert hash(Secret(left)) == hash(Secret(left))


def test_a_secret_is_not_equal_to_a_plain_string():
    assert Secret("a") != "a"


def test_a_secret_reaches_another_process_but_not_a_json_document():
    secret = Secret("hidden")

    assert pickle.loads(pickle.dumps(secret)) == secret  # noqa: S301 - our own bytes
    with pytest.raises(TypeError):
        msgspec.json.encode({"key": secret})
