"""What the OpenAPI document says of the dialect's routes. Only what we read is described.

Everything else in a body passes through as it came.
"""

from typing import Any

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param", "doc_url", "request_id"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "doc_url": {"type": "string"},
                "request_id": {"type": "string"},
            },
        }
    },
}
SCHEMAS: dict[str, Any] = {
    "ChatCompletionRequest": {
        "type": "object",
        "required": ["model", "messages"],
        "additionalProperties": True,
        "properties": {
            "model": {"type": "string", "description": "An id of GET /v1/models."},
            "messages": {"type": "array", "items": {"type": "object"}},
            "stream": {"type": "boolean"},
            "stream_options": {
                "type": "object",
                "properties": {"include_usage": {"type": "boolean"}},
            },
            "max_completion_tokens": {"type": "integer", "minimum": 1},
            "max_tokens": {"type": "integer", "minimum": 1},
            "n": {"type": "integer", "minimum": 1},
        },
    },
    "Model": {
        "type": "object",
        "required": ["id", "object", "created", "owned_by"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "context_length": {"type": "integer"},
            "pricing": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    },
}
_ERROR_ANSWER = {
    "description": "The error envelope, with a code for machines and a message for people.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_CREDENTIALS: list[dict[str, list[str]]] = [{"api_key": []}, {"session": []}]


def _answers(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": description, "content": content}, "default": _ERROR_ANSWER}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_MODEL = {"$ref": "#/components/schemas/Model"}
_MODELS = {
    "type": "object",
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
PATHS: dict[str, Any] = {
    "/v1/chat/completions": {
        "post": {
            "operationId": "ChatCompletions",
            "summary": "Create a chat completion",
            "description": "OpenAI's chat completions; `usage` carries cost and receipt.",
            "security": _CREDENTIALS,
            "parameters": [
                {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
                }
            ],
            "requestBody": {
                "required": True,
                "content": _json({"$ref": "#/components/schemas/ChatCompletionRequest"}),
            },
            "responses": _answers(
                "The completion, or its stream.",
                {**_json({"type": "object"}), "text/event-stream": {"schema": {"type": "string"}}},
            ),
        }
    },
    "/v1/models": {
        "get": {
            "operationId": "ListModels",
            "summary": "List the models on offer",
            "security": _CREDENTIALS,
            "responses": _answers("All models.", _json(_MODELS)),
        }
    },
    "/v1/models/{id}": {
        "get": {
            "operationId": "GetModel",
            "summary": "Show one model",
            "security": _CREDENTIALS,
            "parameters": [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ],
            "responses": _answers("The model.", _json(_MODEL)),
        }
    },
}
