"""The rules of the house: sizes, who may import whom, what money code may say.

A rule takes one parsed source and yields violations; it is tried on small bad sources in
tests/unit/test_tidy.py. Everything that a new module or dependency may need to change stands in
tidy_tables.py.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from tests.support.tidy_tables import (
    CALLERS_OF_STAGES,
    CATCHES_ALL,
    DOORS,
    EVERYWHERE,
    FILE_LINES_MAX,
    FLOAT_IN_BILLING,
    FUNCTION_LINES_MAX,
    GATEWAY_BARS,
    HTTP,
    HTTP_IN_BILLING,
    IO,
    MAY_IMPORT_BENCH,
    NESTING_MAX,
    OURS,
    OWNS_TASKS,
    PACKAGES,
    PROTOCOLS_MAY_IMPORT,
    PURE,
    PURE_MAY_IMPORT,
    READS_ENVIRON,
    SIZED,
    STAGES,
)

NOT_MONEY = "-- not money"
LOOPS_AND_WITHS = (ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith)
BLOCKS = (ast.If, ast.Try, ast.TryStar, ast.Match, *LOOPS_AND_WITHS)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, order=True)
class Violation:
    """Prints as `file:line rule`."""

    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.rule}"


@dataclass(frozen=True)
class Source:
    """One file; path is relative to the root of the project, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text if self.path.endswith(".py") else "", self.path)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.module if self.path.endswith("/__init__.py") else self.module.rpartition(".")[0]

    def at(self, line: int, rule: str) -> Violation:
        return Violation(self.path, line, rule)


Rule = Callable[[Source], Iterator[Violation]]


def sources(root: Path, folders: Iterable[str]) -> Iterator[Source]:
    """Every Python file below these folders of root, and the till's Lua; no folder, no files."""
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    for file in sorted([*files, *(root / "billing/lua").rglob("*.lua")]):
        yield Source(file.relative_to(root).as_posix(), file.read_text("utf-8"))


def check(rule: Rule, root: Path) -> list[Violation]:
    folders = SIZED if rule in SIZE_RULES else PACKAGES
    return sorted(v for source in sources(root, folders) for v in rule(source))


def within(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of prefixes or inside one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def listed(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that is imported, at any depth and however spelled."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = source.package.split(".")
                start = parts[: len(parts) - level + 1] if level else []
                base = ".".join([*start, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func).endswith(("import_module", "__import__")):
                    yield node.lineno, name


def top(name: str) -> str:
    return name.partition(".")[0]


def file_size(source: Source) -> Iterator[Violation]:
    lines = len(source.text.splitlines())
    if lines > FILE_LINES_MAX:
        yield source.at(lines, f"file-size: {lines} lines, at most {FILE_LINES_MAX}")


def function_size(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                said = f"{node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"
                yield source.at(node.lineno, f"function-size: {said}")


def nesting(source: Source) -> Iterator[Violation]:
    """Blocks inside blocks of one function; an inner function is one level of its parent."""
    for node, depth in _depths(source.tree, 0):
        if depth == NESTING_MAX + 1:
            yield source.at(node.lineno, f"nesting: level {depth}, at most {NESTING_MAX}")


def _depths(parent: ast.AST, depth: int, *, inside: bool = False) -> Iterator[tuple[ast.stmt, int]]:
    for child in ast.iter_child_nodes(parent):
        block = isinstance(child, BLOCKS) or (inside and isinstance(child, FUNCTIONS))
        level = depth + 1 if block and not _is_elif(parent, child) else depth
        if isinstance(child, ast.stmt) and level > depth:
            yield child, level
        yield from _depths(child, level, inside=inside or isinstance(child, FUNCTIONS))


def _is_elif(parent: ast.AST, child: ast.AST) -> bool:
    # An elif is an If alone in the orelse of its parent, in the same column.
    return (
        isinstance(parent, ast.If)
        and isinstance(child, ast.If)
        and parent.orelse == [child]
        and parent.col_offset == child.col_offset
    )


def import_direction(source: Source) -> Iterator[Violation]:
    for line, name in imports(source):
        if problem := _wrong_way(source.module, name):
            yield source.at(line, f"import-direction: {problem}")


def _wrong_way(module: str, name: str) -> str | None:
    package = top(module)
    ours = PACKAGES.get(package, tuple(OURS))
    if top(name) == "bench" and module in MAY_IMPORT_BENCH:
        return None
    if top(name) in OURS and top(name) not in (package, *ours):
        return f"{package} must not import {top(name)}"
    for importer, bars in GATEWAY_BARS.items():
        if within(module, [importer]) and within(name, bars):
            return f"{importer} must not import {name}"
    is_protocol = within(module, ["gateway.protocols"])
    if is_protocol and top(name) == "gateway" and not within(name, PROTOCOLS_MAY_IMPORT):
        return f"gateway.protocols must not import {name}"
    own = [stage for stage in STAGES if within(module, [f"gateway.relay.{stage}"])]
    others = {*STAGES, *CALLERS_OF_STAGES} - set(own)
    if own and within(name, [f"gateway.relay.{other}" for other in others]):
        return f"stage {own[0]} must not import {name}"
    return None


def one_door(source: Source) -> Iterator[Violation]:
    known = {*sys.stdlib_module_names, *OURS, *EVERYWHERE}
    for line, name in imports(source):
        package = top(name)
        if package in known or listed(source.path, DOORS.get(package, ())):
            continue
        where = ", ".join(DOORS.get(package, ())) or "none yet: add one to DOORS"
        yield source.at(line, f"one-door: {package} (doors: {where})")


def pure(source: Source) -> Iterator[Violation]:
    if not within(source.module, PURE):
        return
    for line, name in imports(source):
        if within(name, IO):
            yield source.at(line, f"pure: imports {name}")
        elif top(name) in OURS and not within(name, (*PURE, *PURE_MAY_IMPORT)):
            yield source.at(line, f"pure: imports {name}, which is not pure")
    for node in ast.walk(source.tree):
        match node:
            case ast.AsyncFunctionDef(name=name):
                yield source.at(node.lineno, f"pure: {name} is async")
            case ast.Call(func=ast.Name(id="open" | "input" as name)):
                yield source.at(node.lineno, f"pure: calls {name}()")
            case ast.Call(func=ast.Attribute(attr="now" | "utcnow" | "today" as name)):
                yield source.at(node.lineno, f"pure: reads the clock with .{name}()")


def no_float(source: Source) -> Iterator[Violation]:
    if not source.path.startswith("billing/") or source.path in FLOAT_IN_BILLING:
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.Name(id="float") | ast.Attribute(attr="float"):
                yield source.at(node.lineno, "no-float: the name float")
            case ast.Constant(value=float() | complex() as value):
                yield source.at(node.lineno, f"no-float: the literal {value!r}")
            case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
                yield source.at(node.lineno, "no-float: the operator /")


def no_http_in_billing(source: Source) -> Iterator[Violation]:
    if not source.path.startswith("billing/") or source.path in HTTP_IN_BILLING:
        return
    for line, name in imports(source):
        if within(name, {*HTTP, "urllib.request"}):
            yield source.at(line, f"no-http-in-billing: imports {name}")


def no_catch_all(source: Source) -> Iterator[Violation]:
    """`except BaseException` that ends in a bare `raise` cleans up and catches nothing."""
    if source.path in CATCHES_ALL:
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.ExceptHandler(
                type=ast.Name(id="BaseException"), body=[*_, ast.Raise(exc=None)]
            ):
                continue
            case ast.ExceptHandler(type=None):
                yield source.at(node.lineno, "no-catch-all: bare except")
            case ast.ExceptHandler(type=ast.expr() as caught) if _catches_all(caught):
                yield source.at(node.lineno, f"no-catch-all: except {ast.unparse(caught)}")
            case ast.Call(func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=args):
                if any(map(_catches_all, args)):
                    yield source.at(node.lineno, f"no-catch-all: {ast.unparse(node)}")


def _catches_all(caught: ast.expr) -> bool:
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def no_bare_task(source: Source) -> Iterator[Violation]:
    """A TaskGroup awaits its tasks; any other task needs an owner that does."""
    if source.path in OWNS_TASKS:
        return
    withs = [node for node in ast.walk(source.tree) if isinstance(node, ast.AsyncWith)]
    opened = [ast.unparse(item) for node in withs for item in node.items]
    groups = {text.rpartition(" as ")[2] for text in opened if "TaskGroup() as " in text}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if name in ("create_task", "ensure_future") and owner not in groups:
                yield source.at(node.lineno, f"no-bare-task: {name} outside the supervisor")


def no_print(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield source.at(node.lineno, "no-print: log an event, or write through the CLI")


def no_environ(source: Source) -> Iterator[Violation]:
    if listed(source.path, READS_ENVIRON):
        return
    banned = {f"os.{name}" for name in ("environ", "environb", "getenv", "getenvb", "putenv")}
    spoken = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    for line, name in [*imports(source), *((node.lineno, ast.unparse(node)) for node in spoken)]:
        if name in banned:
            yield source.at(line, f"no-environ: {name} outside gateway/cli")


# Comments and strings of Lua, long brackets included; a bracket closes at its own level.
LUA_TOKEN = re.compile(
    r"(?P<comment>\A#![^\n]*|--\[(=*)\[.*?\]\2\]|--[^\n]*)"
    r"|(?P<string>\[(=*)\[.*?\]\4\]|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')",
    re.DOTALL,
)
# A minus after an operator, an opening bracket or a keyword negates; after an operand it subtracts.
LUA_NEGATION = re.compile(
    r"(?:[-+*/%^=<>~,(\[{]|\b(?:return|and|or|not|then|else|do|in))\s*-\s*[A-Za-z_(]"
)


def lua(source: Source) -> Iterator[Violation]:
    if not source.path.endswith(".lua"):
        return
    if not source.text.startswith("#!lua"):
        yield source.at(1, "lua: begins with #!lua")
    lines = LUA_TOKEN.sub(_blank, source.text).split("\n")
    said = LUA_TOKEN.sub(lambda token: token["comment"] or _blank(token), source.text).split("\n")
    for number, line in enumerate(lines, 1):
        is_money = NOT_MONEY not in said[number - 1]
        if re.search(r"\btostring\b", line):
            yield source.at(number, "lua: tostring loses digits of money above 1e14")
        if re.search(r"-tonumber\s*\(", line):
            yield source.at(number, "lua: -tonumber(x) may be -0; write 0 - x")
        elif is_money and LUA_NEGATION.search(line):
            yield source.at(number, f"lua: a negation may be -0; write 0 - x, or say {NOT_MONEY}")
        if is_money and re.search(r"(?<!\.)\.\.(?!\.)", line):
            yield source.at(number, f"lua: .. loses digits of money; else say {NOT_MONEY}")


def _blank(token: re.Match[str]) -> str:
    kept = "''" if token["string"] else ""
    return kept + "\n" * token[0].count("\n")


SIZE_RULES: tuple[Rule, ...] = (file_size, function_size, nesting)
RULES: tuple[Rule, ...] = (
    *SIZE_RULES,
    *(import_direction, one_door, pure, no_float, no_http_in_billing),
    *(no_catch_all, no_bare_task, no_print, no_environ, lua),
)
