import base64

import pytest

from config.load import load, missing_secrets, weak_secrets
from config.secret import Secret
from config.strength import key_bytes, key_weakness, token_weakness, weakness

PEPPER = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"
KEY = bytes(range(100, 132))


def test_a_pepper_of_few_different_characters_is_weak():
    assert weakness(Secret("01" * 15 + "0011010010")) == "made of too few different characters"
    assert weakness(Secret("p" * 16 + "e" * 16 + "r" * 16)) == (
        "made of too few different characters"
    )
    assert weakness(Secret(PEPPER)) is None


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("", "shorter than 16 characters"),
        (PEPPER[:15], "shorter than 16 characters"),
        ("abc" * 10, "one piece repeated"),
        ("please-change-this-token", "made of obvious words"),
        (PEPPER[:16], None),
    ],
)
def test_a_bearer_token_has_to_be_more_than_a_word(token, why):
    assert token_weakness(Secret(token)) == why


@pytest.mark.parametrize(
    "text",
    [
        KEY.hex(),
        KEY.hex().upper(),
        base64.b64encode(KEY).decode(),
        base64.urlsafe_b64encode(KEY).decode(),
        base64.urlsafe_b64encode(KEY).decode().rstrip("="),
        base64.b64encode(KEY).decode() + "\n",
    ],
)
def test_an_encryption_key_is_hex_or_base64(text):
    assert key_bytes(Secret(text)) == KEY
    assert key_weakness(Secret(text)) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (KEY[:31].hex(), "expected at least 32 bytes as hex or base64"),
        (base64.b64encode(KEY[:31]).decode(), "expected at least 32 bytes as hex or base64"),
        ("this is a sentence and no key at all, however long it is", "expected at least 32 bytes"),
        ("0" * 64, "not random"),
        ("YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFh", "not random"),
    ],
)
def test_what_is_no_encryption_key_is_told_without_being_shown(text, why):
    said = key_weakness(Secret(text))

    assert said is not None
    assert said.startswith(why)
    assert text not in said


def test_everything_missing_or_weak_is_named_at_once_and_never_shown():
    values = {
        "FAREBOX_KEYS__PEPPER": "hunter2",
        "FAREBOX_KEYS__PEPPER_PREVIOUS": "hunter3hunter3",
        "FAREBOX_KEYS__ENCRYPTION_KEY": "hunter4",
        "FAREBOX_KEYS__ENCRYPTION_KEY_PREVIOUS": "0" * 64,
        "FAREBOX_METRICS__TOKEN": "hunter5",
    }
    settings = load(None, values).settings

    said = weak_secrets(settings)

    assert [text.partition(":")[0] for text in said] == list(values)
    assert not any(value in text for value in values.values() for text in said)
    assert missing_secrets(settings, ["book.request_url", "till.url"]) == [
        "FAREBOX_BOOK__REQUEST_URL",
        "FAREBOX_TILL_URL",
    ]


def test_one_secret_for_two_purposes_is_refused():
    provider = {"kind": "openai", "base_url": "https://a.test/v1", "key": Secret(PEPPER)}
    settings = load(
        None,
        {},
        {
            "keys.pepper": Secret(PEPPER),
            "keys.pepper_previous": Secret(PEPPER),
            "keys.encryption_key": Secret(KEY.hex()),
            "metrics.token": Secret(KEY.hex()),
            "providers": {"one": provider, "two": provider, "three": {"kind": "echo"}},
        },
    ).settings

    assert weak_secrets(settings) == [
        "FAREBOX_KEYS__PEPPER_PREVIOUS: the same as FAREBOX_KEYS__PEPPER",
        "FAREBOX_METRICS__TOKEN: the same as FAREBOX_KEYS__ENCRYPTION_KEY",
        "FAREBOX_PROVIDERS__ONE__KEY: the same as FAREBOX_KEYS__PEPPER",
        "FAREBOX_PROVIDERS__TWO__KEY: the same as FAREBOX_KEYS__PEPPER",
    ]


def test_two_providers_may_know_us_by_one_key():
    provider = {"kind": "openai", "base_url": "https://a.test/v1", "key": Secret("sk")}
    settings = load(None, {}, {"providers": {"one": provider, "two": provider}}).settings

    assert weak_secrets(settings) == []
