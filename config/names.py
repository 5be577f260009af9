"""How a setting is named: its dotted path, its environment variable, and the way back (pure).

Ids of providers and models may contain the separators themselves (`gpt-4.1`, `meta/llama:free`), so
a name is resolved against the types and the known ids, never split blindly.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import NoneType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from config.secret import Secret

PREFIX = "FAREBOX_"
ALIASES = {"FAREBOX_DATABASE_URL": "book.url", "FAREBOX_TILL_URL": "till.url"}
FRESH_ENVIRON_ID = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")

Ids = Mapping[str, Iterable[str]]
"""Known ids by table: {"providers": ..., "models": ...}."""


class Target(NamedTuple):
    """A setting: where it is and what type it has."""

    path: tuple[str, ...]
    hint: object


class Naming(NamedTuple):
    """One way to write paths: `fresh(table, id)` says whether an unknown id may be introduced."""

    separator: str
    spell: Callable[[str], str]
    fresh: Callable[[str, str], bool]


def variable(path: Iterable[str]) -> str:
    """Return the environment name of a path; the two store urls go by their short names."""
    parts = tuple(path)
    dotted = ".".join(parts)
    for alias, target in ALIASES.items():
        if target == dotted:
            return alias
    return PREFIX + "__".join(_underscored(part) for part in parts).upper()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)`, or nothing when no known name is close."""
    found = difflib.get_close_matches(name[:200], list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def readable(name: str) -> str:
    """Return a name from outside as it can be printed on one line of a terminal."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= 200 else shown[:200] + "..."


def nested(path: tuple[str, ...], value: object) -> dict[str, object]:
    """Return the value inside one table for each part of the path."""
    tree = {path[-1]: value}
    for part in reversed(path[:-1]):
        tree = {part: tree}
    return tree


def find(kind: type[Struct], name: str, naming: Naming, ids: Ids) -> list[Target]:
    """Return every setting below `kind` that the name can mean: none, one, or more (ambiguous)."""
    for field in fields(kind):
        if name == field.name:
            return [Target((field.name,), field.type)]
        tail = _after(name, field.name, naming)
        if tail is not None:
            found = _find_below(field, tail, naming, ids)
            return [Target((field.name, *target.path), target.hint) for target in found]
    return []


def every(kind: type[Struct], ids: Ids) -> Iterator[Target]:
    """Yield every leaf below `kind`, with the entries whose ids are known."""
    for field in fields(kind):
        table, entry = table_of(field.type), entry_of(field.type)
        if table is not None:
            below: Iterable[Target] = every(table, ids)
        elif entry is not None:
            below = (
                Target((known, *target.path), target.hint)
                for known in ids.get(field.name, ())
                for target in every(entry, ids)
            )
        else:
            below = [Target((), field.type)]
        for target in below:
            yield Target((field.name, *target.path), target.hint)


def table_of(hint: object) -> type[Struct] | None:
    """Return the struct of a (perhaps optional) table."""
    plain = bare(hint)
    return plain if isinstance(plain, type) and issubclass(plain, Struct) else None


def entry_of(hint: object) -> type[Struct] | None:
    """Return the struct of the entries of a table of ids."""
    return table_of(get_args(hint)[1]) if get_origin(hint) is dict else None


def item_of(hint: object) -> type[Struct] | None:
    """Return the struct of the items of a list."""
    return table_of(get_args(hint)[0]) if get_origin(hint) is list else None


def bare(hint: object) -> object:
    """Return the hint without `| None` and without its range."""
    if isinstance(hint, type):
        return hint
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    if optional(hint):
        return bare(next(arg for arg in get_args(hint) if arg is not NoneType))
    return hint


def optional(hint: object) -> bool:
    return get_origin(hint) not in (Annotated, Literal) and NoneType in get_args(hint)


def is_secret(hint: object) -> bool:
    return bare(hint) is Secret


def environ_naming() -> Naming:
    """Return FAREBOX_A__B names: only a provider with a simple id may be new."""
    return Naming(
        "__",
        _underscored,
        lambda table, new: table == "providers" and FRESH_ENVIRON_ID.fullmatch(new) is not None,
    )


def dotted_naming() -> Naming:
    """Return a.b names, where any id may be new."""
    return Naming(".", str, lambda _table, new: new != "")


def _underscored(part: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", part.lower())


def _after(name: str, head: str, naming: Naming) -> str | None:
    start = head + naming.separator
    return name[len(start) :] if name.startswith(start) else None


def _find_below(field: FieldInfo, tail: str, naming: Naming, ids: Ids) -> list[Target]:
    table, entry = table_of(field.type), entry_of(field.type)
    if table is not None:
        return find(table, tail, naming, ids)
    if entry is None:
        return []
    known = list(dict.fromkeys(ids.get(field.name, ())))
    found: list[Target] = []
    for each in known:
        found += _find_entry(each, naming.spell(each), entry, tail, naming)
    return found or _find_fresh(field.name, entry, tail, naming)


def _find_entry(
    each: str, spelt: str, entry: type[Struct], name: str, naming: Naming
) -> list[Target]:
    if name == spelt:
        return [Target((each,), entry)]
    tail = _after(name, spelt, naming)
    if tail is None:
        return []
    return [Target((each, *target.path), target.hint) for target in find(entry, tail, naming, {})]


def _find_fresh(table: str, entry: type[Struct], name: str, naming: Naming) -> list[Target]:
    """The shortest new id whose remainder is a setting, or else the whole name as a new id."""
    cut = name.find(naming.separator)
    while cut > 0:
        new = name[:cut]
        found = _find_entry(new, new, entry, name, naming) if naming.fresh(table, new) else []
        if found:
            return found
        cut = name.find(naming.separator, cut + 1)
    return [Target((name,), entry)] if naming.fresh(table, name) else []
