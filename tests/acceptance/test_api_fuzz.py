"""Whatever the OpenAPI document allows, and what it does not, is answered and never with a 500.

Schemathesis draws requests from the document of a running demo. The default run takes a few for
each operation and credential, always the same; `--full` takes many.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.support.farebox import Running, running_demo

CASES, CASES_FULL = 4, 150
# Those that answer with an envelope; what is not ready says so in words of its own.
PLAIN = {"GET /readyz"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_demo(tmp_path_factory.mktemp("fuzz")) as demo:
        yield demo


def credentials(demo: Running) -> dict[str, str]:
    return {
        "nobody": "",
        "a key": f"Bearer {demo.api_key}",
        "an operator": f"Bearer {demo.facts['operator_key']}",
    }


def document(demo: Running) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{demo.origin}/openapi.json", timeout=20).json()
    # Who we are is ours to say: not to be drawn.
    found["components"].pop("securitySchemes")
    for item in found["paths"].values():
        for operation in item.values():
            operation.pop("security")
    return found


def test_no_request_that_can_be_drawn_is_a_500(demo: Running, is_full: bool) -> None:
    schema = schemathesis.openapi.from_dict(document(demo))
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    seen: dict[str, set[int]] = {}
    with requests.Session() as http:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                statuses = ask(demo, http, operation, mode, CASES_FULL if is_full else CASES)
                seen.setdefault(operation.label, set()).update(statuses)

    assert len(seen) >= 5
    assert any(200 in statuses for statuses in seen.values()), seen
    assert {401, 400} <= set().union(*seen.values()), seen


def ask(demo: Running, http: requests.Session, operation: Any, mode: Any, count: int) -> set[int]:
    """Draw count requests, send each with every credential; the statuses that came."""
    statuses: set[int] = set()

    @seed(17)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        for who, header in credentials(demo).items():
            sent = {"authorization": header} if header else {}
            answer = case.call(base_url=demo.origin, headers=sent, session=http, timeout=30)
            check(case, who, answer)
            statuses.add(answer.status_code)

    # Some operations take nothing that could be wrong.
    with contextlib.suppress(*((Unsatisfiable,) if mode is GenerationMode.NEGATIVE else ())):
        run()
    return statuses


def check(case: Any, who: str, answer: Any) -> None:
    where = f"{case.as_curl_command()} by {who}: {answer.status_code} {answer.content[:300]!r}"
    assert answer.status_code < 500 or is_refusal_for_now(case, answer), where
    assert "x-request-id" in answer.headers or answer.status_code < 400, where
    if answer.status_code >= 400 and case.operation.label not in PLAIN and case.method != "HEAD":
        error = json.loads(answer.content)["error"]
        assert set(error) >= {"message", "type", "code", "param", "request_id"}, where


def is_refusal_for_now(case: Any, answer: Any) -> bool:
    """A 503 says that something is not ready, which is no fault of ours."""
    return answer.status_code == 503
