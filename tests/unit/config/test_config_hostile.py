"""Whatever stands in the sources, loading ends in settings or in ConfigError."""

import string
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import fields

from config.errors import ConfigError
from config.load import describe, load
from config.names import every, variable
from config.settings import Model, Price, Provider, Route, Settings

KEYS = sorted(
    {field.name for kind in (Settings, Provider, Model, Price, Route) for field in fields(kind)}
    | {part for target in every(Settings, {}) for part in target.path}
    | {"pepper_file", "key_file", "url_file", "echo", "gpt-4.1", "a/b:c", "", "\n"}
)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["openai", "echo", "live", "http://a/", "1.5", "-1"]),
    st.datetimes(),
    st.dates(),
    st.none(),
)
TREES = st.recursive(
    SCALARS,
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), below, max_size=4),
    ),
    max_leaves=20,
)
PROVIDERS = st.fixed_dictionaries({}, optional={field.name: TREES for field in fields(Provider)})
MODELS = st.fixed_dictionaries({}, optional={field.name: TREES for field in fields(Model)})
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        **{field.name: TREES for field in fields(Settings)},
        "providers": st.dictionaries(st.text(max_size=3), PROVIDERS | TREES, max_size=3),
        "models": st.dictionaries(st.text(max_size=3), MODELS | TREES, max_size=3),
    },
)
NAMES = st.one_of(
    st.sampled_from([variable(target.path) for target in every(Settings, {})]),
    st.sampled_from(
        ["FAREBOX_SERVER", "FAREBOX_MODELS", "FAREBOX_PROVIDERS", "FAREBOX_PROVIDERS__E"]
    ),
    st.sampled_from(["FAREBOX_", "FAREBOX__", "FAREBOX_PROVIDERS__", "FAREBOX_PROVIDERS____KEY"]),
    st.text(string.ascii_letters + "_-.\u0130", max_size=20).map(lambda rest: f"FAREBOX_{rest}"),
).flatmap(lambda name: st.sampled_from([name, f"{name}_FILE", name.lower()]))
JSON = ["{}", "[]", "1", '{"e": {}}', '{"e": {"kind": "echo"}}']


def outcome(path=None, environ=None, overrides=None) -> None:
    try:
        loaded = load(path, environ or {}, overrides or {})
    except ConfigError as exc:
        problems = exc.problems
    else:
        assert [key for key, _, _ in describe(loaded)] == list(loaded.origin)
        return
    assert problems
    assert all(problem.isprintable() and ": " in problem for problem in problems)


@given(SETTINGS)
def test_any_tree_of_values_is_loaded_or_refused(tree):
    outcome(overrides=tree)


@given(st.dictionaries(NAMES, st.text(max_size=10) | st.sampled_from(JSON)))
@example({"FAREBOX_SERVER__HOST_FILE": "\x1f"})
@example({"FAREBOX_PROVIDERS": "[" * 100_000})
@example({"FAREBOX_PROVIDERS__E__FILE__FILE": "1"})
def test_any_environment_is_loaded_or_refused(environ):
    outcome(environ=environ)


@given(st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
@example(b"[models.'\\n']\n'a\\u0007' = 1")
@example(b'[models."\\n"]\n"a\\u0007" = 1')
def test_any_file_is_loaded_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "farebox.toml"
        path.write_bytes(content)
        outcome(path)


@given(st.dictionaries(st.text(max_size=12) | st.sampled_from(KEYS), TREES, max_size=4))
def test_any_dotted_override_is_loaded_or_refused(overrides):
    outcome(overrides=overrides)
