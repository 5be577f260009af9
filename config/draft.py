"""Collects values and problems from every source, then builds the settings in one go.

Each value is checked when it arrives, so one run reports everything that is wrong. No message ever
contains a value: it might be a secret at the wrong place.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias, get_args, get_origin

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from config import rules
from config.files import read_secret
from config.names import (
    bare,
    entry_of,
    is_secret,
    item_of,
    nearest,
    readable,
    table_of,
    variable,
)
from config.secret import Secret
from config.settings import Settings

Steps: TypeAlias = tuple[str, ...]


class Source(NamedTuple):
    """Where values come from. `folder` is what relative `*_file` paths start from."""

    kind: Literal["file", "env", "flag"]
    origin: str
    folder: Path


class Leaf(NamedTuple):
    """A checked value and its origin."""

    value: object
    origin: str


class _Broken:
    """Stands for a value that already has a problem, so that nothing else is said about it."""


BROKEN: Final = _Broken()
Node: TypeAlias = dict[str, "Leaf | Node"]


class Draft:
    """Settings in the making."""

    def __init__(self) -> None:
        self.tree: Node = {}
        self.problems: list[str] = []
        self.origin: dict[str, str] = {}

    @property
    def ids(self) -> dict[str, list[str]]:
        """The ids of providers and models so far."""
        return {table: list(_below(self.tree, table)) for table in ("providers", "models")}

    def problem(self, path: Iterable[str], text: str, source: Source | None = None) -> None:
        where = f" ({source.origin})" if source and source.kind != "file" else ""
        self.problems.append(f"{readable('.'.join(path))}: {text}{where}")

    def merge(self, raw: Mapping[str, object], source: Source) -> None:
        """Lay a tree of plain values over what is there."""
        self._merge_table(Settings, self.tree, raw, (), source)

    def build(self) -> Settings | None:
        """Return the settings and fill `origin`; None when anything is wrong."""
        self._check_routes()
        settings = self._build(Settings, self.tree, ())
        return settings if isinstance(settings, Settings) and not self.problems else None

    def _merge_table(
        self, kind: type[Struct], node: Node, raw: Mapping[str, object], path: Steps, source: Source
    ) -> None:
        known = {field.name: field for field in fields(kind)}
        for key, value in raw.items():
            target = known.get(key.removesuffix("_file"))
            if key in known:
                self._merge_field(known[key], node, value, (*path, key), source)
            elif target is not None and is_secret(target.type):
                self._merge_secret_file(target.name, node, value, path, source)
            else:
                self._unknown(key, value, path, known, source)

    def _unknown(
        self, key: str, value: object, path: Steps, known: Iterable[str], source: Source
    ) -> None:
        """One problem for one unknown key; inside an unknown table its first leaf is named."""
        where = [*path, key]
        while isinstance(value, Mapping) and value:
            name, value = next(iter(value.items()))
            where.append(str(name))
        self.problem(where, f"unknown key{nearest(key, known)}", source)

    def _merge_field(
        self, field: FieldInfo, node: Node, value: object, path: Steps, source: Source
    ) -> None:
        table, entry, item = table_of(field.type), entry_of(field.type), item_of(field.type)
        if table is not None and (value is not None or field.required or field.default is not None):
            self._merge_below(table, node, value, path, source)
        elif entry is not None:
            self._merge_entries(entry, node, value, path, source)
        elif item is not None:
            node[field.name] = Leaf(self._items(item, value, path, source), source.origin)
        elif is_secret(field.type):
            node[field.name] = Leaf(self._secret(value, path, source), source.origin)
        else:
            node[field.name] = Leaf(self._plain(field.type, value, path, source), source.origin)

    def _merge_below(
        self, table: type[Struct], node: Node, value: object, path: Steps, source: Source
    ) -> None:
        if not isinstance(value, Mapping):
            self.problem(path, f"expected a table, got {type(value).__name__}", source)
            # A required table that is there but wrong is not also missing.
            node.setdefault(path[-1], Leaf(BROKEN, source.origin))
            return
        self._merge_table(table, _opened(node, path[-1]), value, path, source)

    def _merge_entries(
        self, entry: type[Struct], node: Node, value: object, path: Steps, source: Source
    ) -> None:
        if not isinstance(value, Mapping):
            self.problem(path, f"expected a table, got {type(value).__name__}", source)
            return
        entries = _opened(node, path[-1])
        for name, below in value.items():
            wrong = rules.wrong_id(name)
            if wrong:
                self.problem((*path, name), wrong, source)
            else:
                self._merge_below(entry, entries, below, (*path, name), source)

    def _merge_secret_file(
        self, name: str, node: Node, value: object, path: Steps, source: Source
    ) -> None:
        at = (*path, f"{name}_file")
        secret: object = BROKEN
        origin = source.origin
        if not isinstance(value, str) or not value:
            self.problem(at, "expected the path of a file", source)
        else:
            place = source.folder / value
            origin = f"file {place}"
            text, wrong = read_secret(place)
            secret = BROKEN if wrong else self._checked(Secret(text), (*path, name), source)
            if wrong:
                self.problem(at, wrong, source)
        node[name] = Leaf(secret, origin)

    def _secret(self, value: object, path: Steps, source: Source) -> object:
        if isinstance(value, Secret):
            return self._checked(value, path, source)
        if not isinstance(value, str):
            self.problem(path, f"expected str, got {type(value).__name__}", source)
            return BROKEN
        if source.kind == "env":
            return self._checked(Secret(value), path, source)
        self.problem(
            path, f"a secret must not stand here: set {variable(path)} or {path[-1]}_file", source
        )
        return BROKEN

    def _checked(self, secret: Secret, path: Steps, source: Source) -> object:
        wrong = rules.wrong_secret(secret)
        if wrong is None:
            return secret
        self.problem(path, wrong, source)
        return BROKEN

    def _items(self, item: type[Struct], value: object, path: Steps, source: Source) -> object:
        if not isinstance(value, list | tuple):
            self.problem(path, f"expected a list, got {type(value).__name__}", source)
            return BROKEN
        built: list[object] = []
        for index, raw in enumerate(value):
            at = (*path, str(index))
            if not isinstance(raw, Mapping):
                self.problem(at, f"expected a table, got {type(raw).__name__}", source)
                built.append(BROKEN)
                continue
            before = len(self.problems)
            node: Node = {}
            self._merge_table(item, node, raw, at, source)
            one = self._build(item, node, at, keep_origin=False)
            built.append(one if len(self.problems) == before else BROKEN)
        return BROKEN if BROKEN in built else built

    def _plain(self, hint: object, value: object, path: Steps, source: Source) -> object:
        try:
            return msgspec.convert(value, hint)
        except msgspec.ValidationError as exc:
            self.problem(path, _lowered(exc, hint), source)
            return BROKEN

    def _build(
        self, kind: type[Struct], node: Node, path: Steps, keep_origin: bool = True
    ) -> object:
        values: dict[str, object] = {}
        for field in fields(kind):
            value = self._build_field(field, node.get(field.name), (*path, field.name), keep_origin)
            if value is not msgspec.UNSET:
                values[field.name] = value
        if BROKEN in values.values():
            return BROKEN
        table = rules.normalised(kind(**values))
        wrong = list(rules.broken(table))
        for key, text in wrong:
            self.problem((*path, key), text)
        return BROKEN if wrong else table

    def _build_field(
        self, field: FieldInfo, below: "Leaf | Node | None", path: Steps, keep_origin: bool
    ) -> object:
        table, entry = table_of(field.type), entry_of(field.type)
        if entry is not None:
            entries = below if isinstance(below, dict) else {}
            built = {
                name: self._build(entry, one, (*path, name)) if isinstance(one, dict) else BROKEN
                for name, one in entries.items()
            }
            return BROKEN if BROKEN in built.values() else built
        if isinstance(below, dict) and table is not None:
            return self._build(table, below, path, keep_origin)
        if below is None and table is not None and field.default is not None:
            return self._build(table, {}, path, keep_origin)
        leaf = below if isinstance(below, Leaf) else None
        if keep_origin:
            self.origin[".".join(path)] = leaf.origin if leaf else "default"
        if leaf:
            return leaf.value
        if field.required:
            self.problem(path, "required")
            return BROKEN
        return msgspec.UNSET

    def _check_routes(self) -> None:
        """Every route leads to a provider that exists (also when the model has other problems)."""
        providers = _below(self.tree, "providers")
        for model, table in _below(self.tree, "models").items():
            leaf = table.get("routes") if isinstance(table, dict) else None
            routes = leaf.value if isinstance(leaf, Leaf) else None
            for index, route in enumerate(routes if isinstance(routes, list) else ()):
                if route.provider not in providers:
                    path = ("models", model, "routes", str(index), "provider")
                    self.problem(path, f"no such provider{nearest(route.provider, providers)}")


def _below(tree: Node, name: str) -> Node:
    below = tree.get(name, {})
    return below if isinstance(below, dict) else {}


def _opened(node: Node, name: str) -> Node:
    """Return the table of that name, empty when there is none yet or something else stood there."""
    below = node.get(name)
    if not isinstance(below, dict):
        below = node[name] = {}
    return below


def _lowered(exc: msgspec.ValidationError, hint: object) -> str:
    """Turn msgspec's sentence into ours, without the value that it sometimes shows."""
    plain = bare(hint)
    if get_origin(plain) is Literal:
        return "expected one of " + ", ".join(get_args(plain))
    text = str(exc).replace("`", "").replace(" | null", "")
    return text[:1].lower() + text[1:]
