import pytest

from config.load import describe, load, missing_secrets, weak_secrets
from config.secret import Secret
from config.settings import Settings

STRONG = "0f8b1c9e5d7a42638e9bb0c1d2f3a4b5"
NEEDS = ("keys.pepper", "keys.pepper_previous")


def test_the_description_lists_every_leaf_once_with_value_and_origin():
    overrides = {
        "providers.echo": {"kind": "echo"},
        "models.a.b": {"routes": [{"provider": "echo"}]},
    }

    loaded = load(None, {"FAREBOX_SERVER__PORT": "1"}, overrides)
    rows = describe(loaded)

    assert [key for key, _, _ in rows] == list(loaded.origin)
    assert ("server.port", "1", "env FAREBOX_SERVER__PORT") in rows
    assert ("timeouts.body_s", "30.0", "default") in rows
    assert ("metrics.open", "false", "default") in rows
    assert ("models.a.b.routes", '[{"provider":"echo","model":""}]', "flag") in rows
    assert ("models.a.b.price", "", "default") in rows


def test_secrets_are_masked_and_empty_ones_are_seen_to_be_empty():
    loaded = load(None, {"FAREBOX_DATABASE_URL": "postgres://u:hunter2@h/d"})

    rows = {key: value for key, value, _ in describe(loaded)}

    assert (rows["book.url"], rows["till.url"]) == ("***", "")
    assert "hunter2" not in repr(loaded)


def test_missing_secrets_are_named_as_the_variables_to_set():
    overrides = {
        "providers.my-ai.2": {"kind": "openai", "base_url": "http://a"},
        "metrics.token": Secret("x"),
    }
    needs = ["keys.pepper", "providers.my-ai.2.key", "metrics.token", "book.url"]

    assert missing_secrets(load(None, {}, overrides).settings, needs) == [
        "FAREBOX_KEYS__PEPPER",
        "FAREBOX_PROVIDERS__MY_AI_2__KEY",
        "FAREBOX_DATABASE_URL",
    ]


def test_asking_for_something_that_is_no_secret_is_a_bug():
    with pytest.raises(KeyError):
        missing_secrets(Settings(), ["server.port"])


@pytest.mark.parametrize(
    ("pepper", "why"),
    [
        ("change-me", "shorter than 32 characters"),
        (STRONG[:31], "shorter than 32 characters"),
        ("a" * 40, "one piece repeated"),
        ("secret" * 8, "one piece repeated"),
        ("please-change-me-this-is-your-secret-pepper", "made of obvious words"),
    ],
)
def test_a_weak_pepper_is_refused_by_the_name_of_its_variable(pepper, why):
    settings = load(None, {"FAREBOX_KEYS__PEPPER": pepper}).settings

    assert weak_secrets(settings) == [
        f"FAREBOX_KEYS__PEPPER: {why}; use at least 32 random characters"
    ]


def test_a_random_pepper_passes_and_a_missing_one_is_not_also_weak():
    settings = load(None, {"FAREBOX_KEYS__PEPPER": STRONG}).settings

    assert weak_secrets(settings) == []
    assert missing_secrets(settings, NEEDS) == ["FAREBOX_KEYS__PEPPER_PREVIOUS"]
