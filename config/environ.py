"""Reads FAREBOX_* variables: `__` nests, any case, `_FILE` names a file with the value."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_origin

import msgspec

from config.draft import Draft, Source
from config.files import read_secret
from config.names import (
    ALIASES,
    PREFIX,
    Target,
    bare,
    dotted_naming,
    entry_of,
    environ_naming,
    every,
    find,
    item_of,
    nearest,
    nested,
    optional,
    table_of,
    variable,
)
from config.secret import Secret
from config.settings import Settings

NOT_SETTINGS = ("FAREBOX_CONFIG", "FAREBOX_DATA_DIR")
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True}
BOOLEANS |= {"false": False, "0": False, "no": False, "off": False}
INTEGER = re.compile(r"[+-]?[0-9][0-9_]{0,30}")
FILE = "_FILE"


def merge_environ(draft: Draft, environ: Mapping[str, str]) -> None:
    """Lay the variables over the draft: shorter names first, so the more specific one wins."""
    taken: dict[tuple[str, ...], str] = {}
    for name in sorted(environ, key=lambda each: (each.upper(), each)):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in NOT_SETTINGS:
            continue
        targets, from_file = _targets(upper, draft)
        if len(targets) != 1:
            draft.problem([name], _unclear(upper, targets, draft))
        elif targets[0].path in taken:
            draft.problem(targets[0].path, f"set by both {taken[targets[0].path]} and {name}")
        else:
            taken[targets[0].path] = name
            _merge_one(draft, targets[0], name, environ[name], from_file)


def _targets(upper: str, draft: Draft) -> tuple[list[Target], bool]:
    """Find what the name means; the second is true when its value is the path of a file.

    The full name wins over its `_FILE` reading, and both over an id seen for the first time.
    """
    stem = upper.removesuffix(FILE)
    tries = [(upper, False, False)]
    if stem != upper:
        tries += [(stem, True, False), (stem, True, True)]
    tries += [(upper, False, True)]
    for name, from_file, fresh in tries:
        targets = _resolve(name, draft, fresh)
        if targets:
            return targets, from_file
    return [], False


def _resolve(upper: str, draft: Draft, fresh: bool) -> list[Target]:
    alias = ALIASES.get(upper)
    if alias is not None:
        return find(Settings, alias, dotted_naming(), {})
    naming = environ_naming()
    if not fresh:
        naming = naming._replace(fresh=lambda _table, _new: False)
    return find(Settings, upper.removeprefix(PREFIX).lower(), naming, draft.ids)


def _unclear(upper: str, targets: list[Target], draft: Draft) -> str:
    if targets:
        return "may mean " + " or ".join(".".join(target.path) for target in targets)
    known = [variable(target.path) for target in every(Settings, draft.ids)]
    return f"unknown variable{nearest(upper, [*known, *NOT_SETTINGS])}"


def _merge_one(draft: Draft, target: Target, name: str, text: str, from_file: bool) -> None:
    source = Source("env", f"env {name}", Path())
    if from_file:
        text, wrong = read_secret(Path(text))
        if wrong:
            draft.problem(target.path, wrong, source)
            return
    try:
        text.encode()
        value = parse(target.hint, text)
    except UnicodeEncodeError:
        draft.problem(target.path, "expected UTF-8", source)
    except ValueError as exc:
        draft.problem(target.path, str(exc), source)
    else:
        draft.merge(nested(target.path, value), source)


def parse(hint: object, text: str) -> object:
    """Turn text into the plain value that its type needs; ValueError says what was expected."""
    plain = bare(hint)
    if optional(hint) and text.strip() == "null":
        return None
    for kind, parser in PARSERS.items():
        if plain is kind:
            return parser(text)
    if table_of(hint) or entry_of(hint) or item_of(hint) or get_origin(plain) is tuple:
        return _json(text)
    return text


def _boolean(text: str) -> bool:
    try:
        return BOOLEANS[text.strip().lower()]
    except KeyError:
        raise ValueError("expected true or false") from None


def _integer(text: str) -> int:
    if not INTEGER.fullmatch(text.strip()):
        raise ValueError("expected int, got other text")
    return int(text.strip().replace("_", ""))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number, got other text") from None


def _json(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON") from None


PARSERS: dict[type, Callable[[str], object]] = {
    Secret: Secret,
    bool: _boolean,
    int: _integer,
    float: _seconds,
}
