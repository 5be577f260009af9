"""Loads the settings: defaults, then the TOML file, then the environment, then flags.

Failure: ConfigError with every problem at once; a file that cannot be read or parsed stops alone,
because what it would have defined is unknown.
"""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec import Struct
from msgspec.structs import fields

from config.draft import Draft, Source, Steps
from config.environ import merge_environ
from config.errors import ConfigError
from config.files import read_bytes
from config.names import dotted_naming, every, find, is_secret, nearest, nested, readable, variable
from config.secret import Secret
from config.settings import Settings
from config.strength import (
    KEY_BYTES_MIN,
    PEPPER_CHARACTERS_MIN,
    TOKEN_CHARACTERS_MIN,
    key_weakness,
    repeated,
    token_weakness,
    weakness,
)

# How each secret of ours is judged, and what it should be instead. Others are chosen elsewhere.
PEPPER = (weakness, f"use at least {PEPPER_CHARACTERS_MIN} random characters")
TOKEN = (token_weakness, f"use at least {TOKEN_CHARACTERS_MIN} random characters")
SEALING = (key_weakness, f"use {KEY_BYTES_MIN} random bytes, written as hex or base64")
JUDGED: Mapping[str, tuple[Callable[[Secret], str | None], str]] = MappingProxyType(
    {
        "keys.pepper": PEPPER,
        "keys.pepper_previous": PEPPER,
        "keys.encryption_key": SEALING,
        "keys.encryption_key_previous": SEALING,
        "metrics.token": TOKEN,
    }
)
NO_OVERRIDES: Mapping[str, object] = MappingProxyType({})


class Loaded(Struct, frozen=True, kw_only=True):
    """The settings, and for each dotted leaf `default`, `file PATH`, `env NAME` or `flag`."""

    settings: Settings
    origin: dict[str, str]


def load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] = NO_OVERRIDES,
) -> Loaded:
    """Load everything; without a path only the defaults lie below environment and overrides.

    Overrides are dotted keys (`server.port`, `providers.echo`); a secret among them must already be
    a Secret, because arguments of a process are readable by others. Raises ConfigError.
    """
    draft = Draft()
    if path is not None:
        draft.merge(read_toml(path), Source("file", f"file {path}", path.parent))
    merge_environ(draft, environ)
    _merge_overrides(draft, overrides)
    settings = draft.build()
    if settings is None:
        raise ConfigError(tuple(dict.fromkeys(draft.problems)))
    return Loaded(settings=settings, origin=draft.origin)


def read_toml(path: Path) -> dict[str, object]:
    """Parse one file. Raises ConfigError with the file and, for bad syntax, the line."""
    content, wrong = read_bytes(path)
    shown = readable(str(path))
    if wrong:
        raise ConfigError((f"{shown}: {wrong}",))
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise ConfigError((f"{shown}: not UTF-8 (at line {line})",)) from exc
    except RecursionError as exc:
        raise ConfigError((f"{shown}: nested too deeply",)) from exc
    except ValueError as exc:
        end = len(content.splitlines())
        text = str(exc).replace("at end of document", f"at line {end}, the end")
        raise ConfigError((f"{shown}: {readable(text)}",)) from exc


def describe(loaded: Loaded) -> list[tuple[str, str, str]]:
    """Return (key, value, origin) of every leaf, secrets as `***` or empty."""
    leaves = ((".".join(path), value) for path, value in _leaves(loaded.settings, ()))
    return [(key, _shown(value), loaded.origin[key]) for key, value in leaves]


def missing_secrets(settings: Settings, needs: Iterable[str]) -> list[str]:
    """Return the environment names of the needed secrets (dotted keys) that are empty.

    KeyError for a key that is no secret: that is a bug of the caller, not of the configuration.
    """
    return [variable(path) for path, secret in _needed(settings, needs) if not secret]


def weak_secrets(settings: Settings) -> list[str]:
    """Return `NAME: why` for each secret of ours that is set but can be guessed or is another's."""
    secrets = dict(_needed(settings, JUDGED))
    weak = []
    for (path, secret), (judge, better) in zip(secrets.items(), JUDGED.values(), strict=True):
        if secret and (why := judge(secret)) is not None:
            weak.append(f"{variable(path)}: {why}; {better}")
    for name, provider in settings.providers.items():
        secrets["providers", name, "key"] = provider.key
    named = {variable(path): secret for path, secret in secrets.items()}
    ours = {variable(key.split(".")) for key in JUDGED}
    weak += [
        f"{name}: the same as {twin}"
        for name, twin in repeated(named)
        # Two providers may well know us by the same key.
        if twin in ours
    ]
    return weak


def _merge_overrides(draft: Draft, overrides: Mapping[str, object]) -> None:
    source = Source("flag", "flag", Path())
    for key, value in overrides.items():
        targets = find(Settings, key, dotted_naming(), draft.ids)
        stem = key.removesuffix("_file")
        if not targets and stem != key:
            targets = [
                target._replace(path=(*target.path[:-1], f"{target.path[-1]}_file"))
                for target in find(Settings, stem, dotted_naming(), draft.ids)
                if is_secret(target.hint)
            ]
        if len(targets) != 1:
            known = [".".join(target.path) for target in every(Settings, draft.ids)]
            draft.problem([key], f"unknown key{nearest(key, known)}", source)
            continue
        draft.merge(nested(targets[0].path, value), source)


def _needed(settings: Settings, needs: Iterable[str]) -> Iterator[tuple[Steps, Secret]]:
    secrets = {
        ".".join(path): (path, value)
        for path, value in _leaves(settings, ())
        if isinstance(value, Secret)
    }
    return (secrets[key] for key in needs)


def _leaves(value: object, path: Steps) -> Iterator[tuple[Steps, object]]:
    below: Iterable[tuple[str, object]]
    if isinstance(value, Struct):
        below = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, dict):
        below = value.items()
    else:
        yield path, value
        return
    for name, one in below:
        yield from _leaves(one, (*path, name))


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case Secret():
            return str(value) if value else ""
        case str():
            return readable(value)
        case _:
            return msgspec.json.encode(value).decode()
