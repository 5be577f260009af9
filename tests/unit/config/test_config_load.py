from pathlib import Path

import pytest

from config.errors import ConfigError
from config.load import load
from config.secret import Secret
from config.settings import Price, Route, Settings

MODEL = """
[providers.openai]
kind = "openai"
base_url = "https://api.openai.com/v1"

[models."gpt-4.1"]
routes = [{ provider = "openai" }]
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text: str, name: str = "farebox.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def problems(path=None, environ=None, overrides=None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, overrides or {})
    return caught.value.problems


def test_without_any_source_every_setting_has_its_default():
    loaded = load(None, {})

    assert loaded.settings == Settings()
    assert set(loaded.origin.values()) == {"default"}


def test_a_later_source_wins_and_each_value_knows_where_it_came_from(write):
    path = write("[server]\nhost = '::'\nport = 1\nworkers = 2\n")
    environ = {"FAREBOX_SERVER__PORT": "3", "FAREBOX_SERVER__WORKERS": "4"}

    loaded = load(path, environ, {"server.workers": 5})

    server = loaded.settings.server
    assert (server.host, server.port, server.workers) == ("::", 3, 5)
    assert loaded.origin["server.host"] == f"file {path}"
    assert loaded.origin["server.port"] == "env FAREBOX_SERVER__PORT"
    assert loaded.origin["server.workers"] == "flag"
    assert loaded.origin["server.keepalive_timeout_s"] == "default"


def test_all_problems_are_reported_together_each_with_its_path(write):
    path = write(
        """
        [servr]
        port = 8080
        [server]
        port = "8080"
        wrokers = 2
        [billing]
        markup_bps = 9_999
        [limits]
        drains_max = 0
        [log]
        level = "loud"
        [timeouts]
        body_s = nan
        [models.m]
        """
    )

    assert problems(path, {"FAREBOX_SERVER__WORKERS": "x"}, {"keys.cash_ttl_ms": 1}) == (
        "servr.port: unknown key (did you mean server?)",
        "server.port: expected int, got str",
        "server.wrokers: unknown key (did you mean workers?)",
        "billing.markup_bps: expected int >= 10000",
        "limits.drains_max: expected int >= 1",
        "log.level: expected one of debug, info, warning, error",
        "timeouts.body_s: expected float > 0.0",
        "server.workers: expected int, got other text (env FAREBOX_SERVER__WORKERS)",
        "keys.cash_ttl_ms: unknown key (did you mean keys.cache_ttl_ms?) (flag)",
        "models.m.routes: required",
    )


def test_whole_numbers_are_accepted_as_seconds(write):
    assert load(write("[timeouts]\nbody_s = 5"), {}).settings.timeouts.body_s == 5.0


def test_a_missing_file_is_reported_with_its_name(tmp_path):
    path = tmp_path / "nowhere.toml"

    assert problems(path) == (f"{path}: cannot read {path}: No such file or directory",)


def test_a_folder_is_not_a_configuration(tmp_path):
    assert problems(tmp_path) == (f"{tmp_path}: cannot read {tmp_path}: Is a directory",)


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"[server]\nport 8080\n", 2), (b"[server]\n\n# \xff\n", 3), (b"a = 1\na = 2", 2)],
)
def test_bad_syntax_is_reported_with_file_and_line(tmp_path, content, line):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)

    (problem,) = problems(path)

    assert problem.startswith(f"{path}: ")
    assert f"at line {line}" in problem


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000, "\x00"])
def test_hostile_toml_is_a_problem_and_not_a_crash(write, text):
    assert len(problems(write(text))) == 1


def test_a_deep_unknown_table_is_named_once(write):
    (problem,) = problems(write("server." + ".".join(["a"] * 900) + " = 1"))

    assert problem.startswith("server.a.a.a")


def test_a_value_in_the_place_of_a_table_is_refused(write):
    path = write('server = 1\nproviders = 2\nmodels = [1]\n[book]\nurl_file = ""')

    assert problems(path, {"FAREBOX_SERVER__PORT": "1"}) == (
        "server: expected a table, got int",
        "providers: expected a table, got int",
        "models: expected a table, got list",
        "book.url_file: expected the path of a file",
    )


def test_a_secret_in_the_file_is_refused_without_repeating_it(write):
    path = write("[keys]\npepper = 'hunter2'\n[providers.p]\nkind='echo'\nkey='sk-hunter2'")

    found = problems(path)

    assert found == (
        "keys.pepper: a secret must not stand here: set FAREBOX_KEYS__PEPPER or pepper_file",
        "providers.p.key: a secret must not stand here: set FAREBOX_PROVIDERS__P__KEY or key_file",
    )


def test_a_secret_is_read_from_the_file_that_the_toml_names(write, tmp_path):
    (tmp_path / "pepper").write_text("spice\n")
    path = write("[keys]\npepper_file = 'pepper'")

    loaded = load(path, {})

    assert loaded.settings.keys.pepper == Secret("spice")
    assert loaded.origin["keys.pepper"] == f"file {tmp_path / 'pepper'}"


def test_an_unreadable_secret_file_is_reported_at_its_key(write, tmp_path):
    (problem,) = problems(write("[keys]\npepper_file = 'nowhere'"))

    assert problem == (
        f"keys.pepper_file: cannot read {tmp_path / 'nowhere'}: No such file or directory"
    )


def test_only_secrets_may_be_named_by_file(write):
    assert problems(write("[server]\nhost_file = 'x'")) == (
        "server.host_file: unknown key (did you mean host?)",
    )


def test_a_flag_may_carry_a_secret_object_but_no_secret_text():
    assert load(None, {}, {"keys.pepper": Secret("x")}).settings.keys.pepper == Secret("x")

    assert problems(overrides={"keys.pepper": "x"})[0].startswith("keys.pepper: a secret must not")


def test_a_secret_with_a_line_break_is_refused():
    (problem,) = problems(overrides={"keys.pepper": Secret("a\r\nb")})

    assert problem == "keys.pepper: contains a line break or another unprintable character (flag)"


def test_flags_can_define_entries_whose_ids_contain_dots():
    overrides = {
        "providers.echo": {"kind": "echo"},
        "models.demo-4.1": {"routes": [{"provider": "echo", "model": "x"}]},
        "models.demo-4.1.markup_bps": 10_000,
        "models.demo-4.1.price.input_usd_per_mtok": "1",
        "models.demo-4.1.price.output_usd_per_mtok": "2.5",
    }

    model = load(None, {}, overrides).settings.models["demo-4.1"]

    assert model.routes == [Route(provider="echo", model="x")]
    assert model.price == Price(input_usd_per_mtok="1", output_usd_per_mtok="2.5")
    assert model.markup_bps == 10_000


def test_a_secret_file_can_be_given_as_a_flag(tmp_path):
    (tmp_path / "token").write_text("abc\r\n")

    loaded = load(None, {}, {"metrics.token_file": str(tmp_path / "token")})

    assert loaded.settings.metrics.token == Secret("abc")


def test_a_flag_can_take_a_price_away(write):
    price = '[models."gpt-4.1".price]\ninput_usd_per_mtok="1"\noutput_usd_per_mtok="1"'

    loaded = load(write(MODEL + price), {}, {"models.gpt-4.1.price": None})

    assert loaded.settings.models["gpt-4.1"].price is None
    assert loaded.origin["models.gpt-4.1.price"] == "flag"


def test_the_error_prints_one_problem_a_line():
    assert str(ConfigError(("a: b", "c: d"))) == "a: b\nc: d"
