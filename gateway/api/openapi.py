"""The OpenAPI document of everything that is served: built from the handlers, and by hand for /v1.

The dialect's routes are the relay's own and no framework's; openapi_v1.py tells of them.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig

from gateway.api.openapi_v1 import ERROR, PATHS, SCHEMAS
from gateway.api.policy import POLICY, Policy

METHODS = frozenset(("get", "post", "put", "patch", "delete"))
KEY, SESSION, OPERATOR = "api_key", "session", "operator_key"
SECURITY: dict[Policy, list[dict[str, list[str]]]] = {
    Policy.PUBLIC: [],
    Policy.SESSION: [{SESSION: []}],
    Policy.ACCOUNT: [{KEY: []}, {SESSION: []}],
    Policy.PAYMENTS: [{KEY: []}, {SESSION: []}],
    Policy.CREDENTIAL: [{KEY: []}, {SESSION: []}],
    Policy.OPERATOR: [{OPERATOR: []}],
}
SCHEMES = {
    KEY: {"type": "http", "scheme": "bearer", "description": "An API key: fb_live_..."},
    OPERATOR: {"type": "http", "scheme": "bearer", "description": "An operator key: fb_op_..."},
    SESSION: {
        "type": "apiKey",
        "in": "cookie",
        "name": "__Host-farebox",
        "description": "Of a wallet's sign-in. Unsafe methods need a matching Origin too.",
    },
}
# Whatever else can go wrong has the same body.
ANY_ERROR = {
    "description": "The error envelope, with a code for machines and a message for people.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def document(handlers: Sequence[HTTPRouteHandler]) -> bytes:
    """The document as JSON. Takes some 100 ms: call it in a thread, once."""
    config = OpenAPIConfig(
        title="Farebox",
        version=version("farebox"),
        description="A metering gateway for LLM APIs: prepaid credits, one receipt per request.",
        use_handler_docstrings=True,
    )
    app = Litestar(route_handlers=list(handlers), openapi_config=config, logging_config=None)
    found: dict[str, Any] = app.openapi_schema.to_schema()
    policies = _policies(app)
    for path, item in found["paths"].items():
        for method in METHODS & item.keys():
            _finish(item[method], policies[path, method])
    found["paths"] = {**PATHS, **found["paths"]}
    components = found.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **SCHEMAS, "Error": ERROR}
    components["securitySchemes"] = SCHEMES
    return msgspec.json.encode(found)


def _policies(app: Litestar) -> Mapping[tuple[str, str], Policy]:
    found = {}
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            for method in handler.http_methods:
                policy = handler.opt.get(POLICY)
                if policy is not None:
                    found[route.path_format, method.lower()] = Policy(policy)
    return found


def _finish(operation: dict[str, Any], policy: Policy) -> None:
    operation["security"] = SECURITY[policy]
    # Litestar tells of a body for its own refusals that is never sent here.
    operation["responses"] = {
        status: answer
        for status, answer in operation.get("responses", {}).items()
        if status.startswith(("2", "3"))
    }
    operation["responses"]["default"] = ANY_ERROR
