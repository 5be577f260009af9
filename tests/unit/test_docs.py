"""What the code says to operators and clients stands in the docs: events, metrics, error codes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("billing", "config", "gateway", "keys", "migrations")
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
# Names of request parameters stand beside the codes.
PARAMETERS = {"stream_options"}
CODE = re.compile(r"[a-z]+(_[a-z]+)+")


def calls() -> Iterator[ast.Call]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield node


def strings(node: ast.Call) -> list[str]:
    values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def events() -> set[str]:
    return {
        text
        for node in calls()
        if isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS
        for text in strings(node)[:1]
        if EVENT.fullmatch(text)
    }


def error_codes() -> set[str]:
    makers = {"ApiError", "invalid", "unavailable", "upstream_error", "_unauthorized", "_forbidden"}
    return {
        text
        for node in calls()
        if isinstance(node.func, ast.Name) and node.func.id in makers
        for text in strings(node)
        if CODE.fullmatch(text) and not text.endswith("_error") and text not in PARAMETERS
    } | {"upstream_error", "internal_error"}


def metrics() -> set[str]:
    text = (ROOT / "gateway" / "metrics.py").read_text()
    names = re.findall(r'"((?:farebox_)?[a-z]+(?:_[a-z]+)+)",\s+"[A-Z]', text)
    return {name.removeprefix("farebox_") for name in names}


def test_every_event_is_documented() -> None:
    docs = (ROOT / "docs" / "operations.md").read_text()

    assert len(events()) > 15
    assert {event for event in events() if f"`{event}`" not in docs} == set()


def test_every_metric_is_documented() -> None:
    docs = (ROOT / "docs" / "operations.md").read_text()

    assert len(metrics()) > 8
    assert {name for name in metrics() if f"farebox_{name}" not in docs} == set()


def test_every_error_code_has_an_anchor() -> None:
    docs = (ROOT / "docs" / "errors.md").read_text()

    assert len(error_codes()) > 15
    assert {code for code in error_codes() if f'<a id="{code}">' not in docs} == set()


def test_docs_name_no_event_that_does_not_exist() -> None:
    docs = (ROOT / "docs" / "operations.md").read_text()
    rows = docs[docs.index("| event | level |") : docs.index("## Audit")]
    named = {
        name
        for row in rows.splitlines()[2:]
        if row.startswith("|")
        for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", row.split("|")[1])
    }

    assert named == events()
