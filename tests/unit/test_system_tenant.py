"""`is_system_tenant` says which account that is, and is never a reason to allow or refuse anything.

In Python it stands in no condition; in SQL only where the account is made and found.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("billing", "config", "gateway", "keys", "migrations")
FLAG = "is_system_tenant"
MAKES_IT = "billing/system_tenant.py"
CLAUSE = re.compile(r"\b(WHERE|AND|OR|NOT|WHEN|HAVING|ON|CASE|IF)\b[^,;]*\b" + FLAG)


def mentions(node: ast.AST) -> bool:
    """As a name, an attribute, an argument or a key."""
    for each in ast.walk(node):
        named = (getattr(each, field, None) for field in ("id", "attr", "arg", "name", "value"))
        if FLAG in named:
            return True
    return False


def deciding(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that decide which way it goes."""
    match node:
        case ast.If() | ast.IfExp() | ast.While() | ast.Assert():
            yield node.test
        case ast.Match():
            yield node.subject
            yield from (case.guard for case in node.cases if case.guard is not None)
        case ast.comprehension():
            yield from node.ifs
        case ast.Compare() | ast.BoolOp() | ast.UnaryOp():
            yield node


def branches(source: str) -> list[int]:
    """Lines that decide something by the flag."""
    tree = ast.parse(source)
    found = [
        getattr(test, "lineno", 0)
        for node in ast.walk(tree)
        for test in deciding(node)
        if mentions(test)
    ]
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return found + [text.lineno for text in texts if CLAUSE.search(str(text.value))]


def test_nothing_is_decided_by_the_flag() -> None:
    decided = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if branches(path.read_text())
    }

    assert decided == {MAKES_IT}


def test_the_scripts_of_the_till_and_what_a_caller_is_know_nothing_of_it() -> None:
    for path in [*(ROOT / "billing" / "lua").glob("*.lua"), ROOT / "keys" / "principal.py"]:
        assert FLAG not in path.read_text(), path
    for path in (ROOT / "gateway" / "relay").glob("*.py"):
        assert FLAG not in path.read_text(), path


def test_a_branch_on_it_would_be_found() -> None:
    for source in (
        "if account.is_system_tenant: pass",
        "x = 1 if row['is_system_tenant'] else 2",
        "assert not account.is_system_tenant",
        "rows = [r for r in rows if r.is_system_tenant]",
        "free = account.is_system_tenant and True",
        "free = is_system_tenant == True",
        "Q = 'SELECT id FROM accounts WHERE NOT is_system_tenant'",
        "Q = 'SELECT CASE WHEN is_system_tenant THEN 0 ELSE 1 END'",
    ):
        assert branches(source), source
    assert not branches("Q = 'SELECT id, is_system_tenant FROM accounts WHERE id = $1'")
    assert not branches("row = {'is_system_tenant': account.is_system_tenant}")
