"""Bodies of the control plane: small, strictly what a route asks for, each name once.

Nothing that a client sent is repeated in an error but the name of a field: a secret in the wrong
place stays where it was.
"""

import json
import re
from collections.abc import Generator
from typing import Any, TypeVar

import msgspec
from litestar.dto import AbstractDTO, DTOFieldDefinition
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition

from gateway.errors import ApiError

T = TypeVar("T")

BODY_BYTES_MAX = 64 * 1024
FIELD = re.compile(r"[A-Za-z0-9_]{1,40}", re.ASCII)
WHERE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`\Z")
OWN_FIELD = re.compile(r"(?P<problem>required|unknown) field `(?P<name>[^`]*)`")
ENUM = re.compile(r"Invalid enum value [^`]*")


class Wrong(Exception):
    """A name that stands twice in one object."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Body(AbstractDTO[T]):
    """`data` of a handler: its struct, decoded from JSON by msgspec alone, strictly.

    The framework's own way converts what json.loads made of the body, where "5" is a 5 and of two
    fields of the same name the last one counts.
    """

    def decode_bytes(self, value: bytes) -> Any:
        headers = self.asgi_connection.headers
        check_media(headers.get("content-type", ""), headers.get("content-encoding", ""))
        return decode(value, self.model_type)

    @classmethod
    def generate_field_definitions(
        cls, model_type: type[Any]
    ) -> Generator[DTOFieldDefinition, None, None]:
        """None: nothing is transferred field by field."""
        yield from ()

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        return False

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing to prepare: there is no backend."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: Any
    ) -> Reference | Schema:
        schema: Reference | Schema = schema_creator.for_field_definition(field_definition)
        return schema


def check_media(content_type: str, content_encoding: str) -> None:
    """Raises ApiError 415 for anything but plain JSON. It has to be said: a page of another origin
    can send a form or text without asking, but not JSON."""
    if content_encoding.lower() not in {"", "identity"}:
        message = "Compressed request bodies are not accepted."
        raise ApiError(415, "unsupported_encoding", message)
    if content_type.partition(";")[0].strip().lower() != "application/json":
        message = "The body must be JSON: send 'Content-Type: application/json'."
        raise ApiError(415, "unsupported_media_type", message)


def decode(body: bytes, model: type[T]) -> T:
    """The body as its struct. Raises ApiError 400."""
    try:
        data = msgspec.json.decode(body, type=model)
        # What has the shape of a struct is not deep.
        json.loads(body, object_pairs_hook=_once)
    except Wrong as exc:
        param = exc.name if FIELD.fullmatch(exc.name) else None
        raise refuse("A field stands twice in the body.", param) from None
    except msgspec.ValidationError as exc:
        raise _refused(str(exc)) from None
    except msgspec.DecodeError as exc:
        raise refuse(f"The body is no JSON object: {exc}.") from None
    except (ValueError, RecursionError) as exc:
        raise refuse("The body is no JSON object that can be read.") from exc
    return data


def _once(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise Wrong(name)
        seen.add(name)


def _refused(said: str) -> ApiError:
    """msgspec's words with the field they are about, without what was in it."""
    where = WHERE.search(said)
    steps = [where["path"]] if where is not None and where["path"] else []
    message = WHERE.sub("", said)
    field = OWN_FIELD.search(message)
    if field is not None:
        if FIELD.fullmatch(field["name"]):
            steps.append(field["name"])
        is_unknown = field["problem"] == "unknown"
        message = "There is no such field" if is_unknown else "A field is missing"
    message = ENUM.sub("That is none of the words that are allowed here", message)
    return refuse(f"{message}.", ".".join(steps) or None)


def refuse(message: str, param: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, "invalid_request", message, param=param)
