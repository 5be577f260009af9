"""The annotated farebox.toml is what operators read: it must stay true."""

import re
import tomllib
from pathlib import Path

import msgspec

import config
from config.load import load
from config.settings import Model, Price, Provider, Settings

EXAMPLE = Path(config.__file__).with_name("farebox.toml")
# A comment that can be switched on has no space after its mark.
OPTIONAL_LINE = re.compile(r"^#(?=[^ \n])|^#(?=  \{)", re.MULTILINE)


def switched_on(folder: Path) -> Path:
    """Write the example with every optional line in force and its secret files present."""
    text = OPTIONAL_LINE.sub("", EXAMPLE.read_text()).replace("/run/secrets", str(folder))
    for name in re.findall(rf"{re.escape(str(folder))}/(\w+)", text):
        secret = "https://node.example" if name == "rpc_urls" else f"{name} secret"
        (folder / name).write_text(secret)
    path = folder / "all.toml"
    path.write_text(text)
    return path


def test_the_example_as_it_stands_says_exactly_the_defaults():
    assert load(EXAMPLE, {}).settings == Settings()


def test_the_example_shows_every_key(tmp_path):
    tree = tomllib.loads(switched_on(tmp_path).read_text())
    tables = msgspec.structs.asdict(Settings())
    kinds = {name: type(table) for name, table in tables.items() if not isinstance(table, dict)}
    shown = {name: set(tree[name]) for name in kinds}
    shown["provider"] = set().union(*tree["providers"].values())
    shown["model"] = set(tree["models"]["gpt-4.1-mini"])
    shown["price"] = set(tree["models"]["gpt-4.1-mini"]["price"])
    kinds |= {"provider": Provider, "model": Model, "price": Price}

    for name, kind in kinds.items():
        without_file = {key.removesuffix("_file") for key in shown[name]}
        assert without_file == {field.name for field in msgspec.structs.fields(kind)}, name


def test_every_optional_part_of_the_example_works_when_switched_on(tmp_path):
    settings = load(switched_on(tmp_path), {}).settings

    assert list(settings.providers) == ["openai", "openrouter", "litellm", "echo"]
    assert settings.models["gpt-4.1-mini"].price is not None
    assert settings.keys.pepper.reveal() == "pepper secret"


def test_every_key_of_the_example_has_a_comment():
    key = re.compile(r"#?(\w+ = [^\[]|  \{)")
    lines = EXAMPLE.read_text().splitlines()
    bare = [line for line in lines if key.match(line) and "#" not in line[1:]]

    # These speak for themselves: they repeat what the lines before them explain.
    assert all(re.match(r"#(kind|base_url|key_file|\w+_usd_per_mtok|  \{)", line) for line in bare)
