from pathlib import Path

import pytest

from config.errors import ConfigError
from config.load import load
from config.secret import Secret
from config.settings import Provider, Route

ENTRIES = """
[providers.my-openai]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"

[models."meta/llama-3.1:free"]
routes = [{ provider = "my-openai" }]
"""


@pytest.fixture
def entries(tmp_path) -> Path:
    path = tmp_path / "farebox.toml"
    path.write_text(ENTRIES)
    return path


def problems(environ: dict[str, str], path: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ)
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("FAREBOX_SERVER__PORT", " 9_000 ", "port", 9000),
        ("farebox_server__host", "0.0.0.0", "host", "0.0.0.0"),  # noqa: S104 - only a text here
        ("Farebox_Server__Workers", "2", "workers", 2),
    ],
)
def test_a_variable_sets_a_value_whatever_its_case(name, text, key, value):
    assert getattr(load(None, {name: text}).settings.server, key) == value


def test_each_type_is_read_from_text():
    environ = {
        "FAREBOX_METRICS__OPEN": "Yes",
        "FAREBOX_TIMEOUTS__BODY_S": "2.5",
        "FAREBOX_LOG__LEVEL": "debug",
        "FAREBOX_SERVER": '{"port": 1, "workers": 3}',
        "FAREBOX_SERVER__PORT": "2",
        "FAREBOX_PROVIDERS": '{"e": {"kind": "echo", "key": "k"}}',
        "FAREBOX_PROVIDERS__E__FIRST_BYTE_TIMEOUT_S": "null",
        "FAREBOX_MODELS": '{"m": {"routes": []}}',
        "FAREBOX_MODELS__M__ROUTES": '[{"provider": "e"}]',
    }

    settings = load(None, environ).settings

    assert settings.metrics.open is True
    assert settings.timeouts.body_s == 2.5
    assert settings.log.level == "debug"
    assert (settings.server.port, settings.server.workers) == (2, 3)
    assert settings.providers == {"e": Provider(kind="echo", key=Secret("k"))}
    assert settings.models["m"].routes == [Route(provider="e")]


def test_text_that_is_not_of_the_type_is_reported_with_its_variable():
    environ = {
        "FAREBOX_METRICS__OPEN": "perhaps",
        "FAREBOX_TIMEOUTS__BODY_S": "soon",
        "FAREBOX_MODELS": "{",
        "FAREBOX_SERVER__PORT": "",
        "FAREBOX_SERVER__HOST": "\udcff",
    }

    assert problems(environ) == (
        "metrics.open: expected true or false (env FAREBOX_METRICS__OPEN)",
        "models: expected JSON (env FAREBOX_MODELS)",
        "server.host: expected UTF-8 (env FAREBOX_SERVER__HOST)",
        "server.port: expected int, got other text (env FAREBOX_SERVER__PORT)",
        "timeouts.body_s: expected a number, got other text (env FAREBOX_TIMEOUTS__BODY_S)",
    )


def test_entries_of_the_file_are_found_by_their_underscored_ids(entries):
    environ = {
        "FAREBOX_PROVIDERS__MY_OPENAI__KEY": "sk-1",
        "FAREBOX_MODELS__META_LLAMA_3_1_FREE__MARKUP_BPS": "30000",
        "FAREBOX_MODELS__META_LLAMA_3_1_FREE__PRICE__INPUT_USD_PER_MTOK": "1",
        "FAREBOX_MODELS__META_LLAMA_3_1_FREE__PRICE__OUTPUT_USD_PER_MTOK": "2",
    }

    loaded = load(entries, environ)

    model = loaded.settings.models["meta/llama-3.1:free"]
    assert loaded.settings.providers["my-openai"].key == Secret("sk-1")
    assert model.price is not None
    assert (model.markup_bps, model.price.output_usd_per_mtok) == (30_000, "2")
    assert loaded.origin["models.meta/llama-3.1:free.markup_bps"].endswith("__MARKUP_BPS")


def test_a_provider_with_a_simple_id_can_be_new_but_a_model_cannot(entries):
    environ = {
        "FAREBOX_PROVIDERS__OPENAI__KIND": "openai",
        "FAREBOX_PROVIDERS__OPENAI__BASE_URL": "https://api.openai.com/v1/",
        "FAREBOX_MODELS__NEW__MARKUP_BPS": "20000",
    }

    (problem,) = problems(environ, entries)

    assert problem.startswith("FAREBOX_MODELS__NEW__MARKUP_BPS: unknown variable")
    del environ["FAREBOX_MODELS__NEW__MARKUP_BPS"]
    providers = load(entries, environ).settings.providers
    assert providers["openai"].base_url == "https://api.openai.com/v1"


def test_two_ids_with_one_spelling_must_be_set_in_the_file(tmp_path):
    path = tmp_path / "farebox.toml"
    path.write_text("[providers.a-b]\nkind='echo'\n[providers.'a.b']\nkind='echo'")

    assert problems({"FAREBOX_PROVIDERS__A_B__KEY": "x"}, path) == (
        "FAREBOX_PROVIDERS__A_B__KEY: may mean providers.a-b.key or providers.a.b.key",
    )


@pytest.mark.parametrize("name", ["FAREBOX_SERVER__PORT", "FAREBOX_MODELS"])
def test_any_variable_can_name_a_file_instead(tmp_path, name):
    content = {"FAREBOX_SERVER__PORT": "77\n", "FAREBOX_MODELS": "{}\n"}[name]
    (tmp_path / "value").write_text(content)

    loaded = load(None, {f"{name}_FILE": str(tmp_path / "value")})

    assert loaded.settings.server.port == (77 if "PORT" in name else 8080)


def test_only_one_newline_at_the_end_of_a_file_is_dropped(tmp_path):
    (tmp_path / "pepper").write_text(" spice \n")
    (tmp_path / "two").write_text("spice\n\n")
    name = "FAREBOX_KEYS__PEPPER_FILE"

    assert load(None, {name: str(tmp_path / "pepper")}).settings.keys.pepper == Secret(" spice ")
    assert "line break" in problems({name: str(tmp_path / "two")})[0]


@pytest.mark.parametrize("value", ["/nowhere/pepper", "", "a\0b", "/"])
def test_a_file_that_cannot_be_read_is_reported(value):
    (problem,) = problems({"FAREBOX_KEYS__PEPPER_FILE": value})

    assert problem.startswith("keys.pepper: ")
    assert problem.endswith("(env FAREBOX_KEYS__PEPPER_FILE)")


def test_the_short_names_of_the_stores_work_also_as_files(tmp_path):
    (tmp_path / "url").write_text("postgres://book")
    environ = {
        "FAREBOX_DATABASE_URL_FILE": str(tmp_path / "url"),
        "FAREBOX_TILL_URL": "redis://till",
    }

    settings = load(None, environ).settings

    assert settings.book.url == Secret("postgres://book")
    assert settings.till.url == Secret("redis://till")


@pytest.mark.parametrize(
    "names",
    [
        ("FAREBOX_BOOK__URL", "FAREBOX_DATABASE_URL"),
        ("FAREBOX_SERVER__HOST", "farebox_server__host"),
        ("FAREBOX_KEYS__PEPPER", "FAREBOX_KEYS__PEPPER_FILE"),
    ],
)
def test_one_setting_given_twice_is_refused(names):
    (problem,) = problems(dict.fromkeys(names, "x"))

    assert problem.endswith(f"set by both {names[0]} and {names[1]}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("FAREBOX_SERVER_PORT", "FAREBOX_SERVER__PORT"),
        ("FAREBOX_DATABASE_URI", "FAREBOX_DATABASE_URL"),
        ("FAREBOX_CONFG", "FAREBOX_CONFIG"),
        ("FAREBOX_PROVIDERS__MY_OPENAI__KY", "FAREBOX_PROVIDERS__MY_OPENAI__KEY"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(entries, name, meant):
    assert problems({name: "1"}, entries) == (f"{name}: unknown variable (did you mean {meant}?)",)


def test_variables_that_are_no_settings_and_those_of_others_are_left_alone():
    environ = {"FAREBOX_CONFIG": "x", "FAREBOX_DATA_DIR": "y", "PATH": "z", "FAREBOXES": "1"}

    assert set(load(None, environ).origin.values()) == {"default"}


def test_no_value_of_a_variable_stands_in_a_problem():
    environ = {
        "FAREBOX_LOG__LEVEL": "hunter2",
        "FAREBOX_SERVER__PORT": "hunter2",
        "FAREBOX_KEYS": '{"pepper": 2, "mode": "hunter2"}',
        "FAREBOX_PROVIDERS": '["hunter2"]',
    }

    found = problems(environ)

    assert len(found) == 5
    assert not any("hunter2" in problem for problem in found)
