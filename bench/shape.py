"""What the mock shall answer, written into the prompt itself. Pure.

`[[mock chunks=50 every_ms=20]]` anywhere in a message goes through every gateway unchanged, so one
model name is enough for all loads, and an outside load tool can ask for the same.
"""

import re

import msgspec

DIRECTIVE = re.compile(rb"\[\[mock ([a-z0-9_= ]{1,200})\]\]")
WORDS = (
    *("credit", "reserve", "answer", "stream", "settle", "price", "ledger", "receipt", "token"),
    *("model", "route", "meter", "gateway", "budget", "limit", "account", "key", "balance"),
)
CHUNKS_MAX = 100_000
WAIT_MS_MAX = 600_000


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. Everything but `answer_bytes` and `status` is about streams, or about both."""

    chunks: int = 50
    every_ms: int = 0
    first_ms: int = 0
    answer_bytes: int = 600
    usage: int = 1
    """0: no usage frame and no usage in a body."""
    status: int = 200
    """Anything else: an error with that status, at once."""
    stall_after: int = -1
    """Say nothing more after that many chunks (0: not even the head) until the client leaves."""
    cut_after: int = -1
    """Drop the connection after that many chunks."""

    def directive(self) -> str:
        """The text to put into a prompt; values that are defaults are left out."""
        given = [
            f"{name}={value}"
            for name, value in msgspec.structs.asdict(self).items()
            if value != getattr(DEFAULT, name)
        ]
        return f"[[mock {' '.join(given) or 'usage=1'}]]"


DEFAULT = Shape()


def read_shape(body: bytes, default: Shape = DEFAULT) -> Shape:
    """The shape that a body asks for; what it does not name, or names badly, is the default's."""
    found = DIRECTIVE.search(body)
    if found is None:
        return default
    values = {}
    for pair in found[1].decode().split():
        name, _, value = pair.partition("=")
        if name in Shape.__struct_fields__ and value.isdecimal():
            values[name] = int(value)
    shape = msgspec.structs.replace(default, **values)
    return msgspec.structs.replace(
        shape,
        chunks=min(shape.chunks, CHUNKS_MAX),
        every_ms=min(shape.every_ms, WAIT_MS_MAX),
        first_ms=min(shape.first_ms, WAIT_MS_MAX),
        answer_bytes=min(shape.answer_bytes, 16 << 20),
        status=shape.status if 200 <= shape.status <= 599 else 500,
    )


def words(seed: int, size: int) -> str:
    """About `size` bytes of plain words, the same for the same seed."""
    import random

    choose = random.Random(seed).choice
    text = " ".join(choose(WORDS) for _ in range(size // 4))
    return text[:size].rstrip() or "x"


class _Ask(msgspec.Struct):
    include_usage: bool | None = None


class Asked(msgspec.Struct):
    """The few fields of a request that the mock looks at."""

    model: str = "bench"
    stream: bool | None = False
    stream_options: _Ask | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def chat_body(model: str, prompt_bytes: int, shape: Shape, *, stream: bool, seed: int) -> bytes:
    """A chat completion request whose JSON is prompt_bytes long."""
    request: dict[str, object] = {"model": model}
    if stream:
        request |= {"stream": True, "stream_options": {"include_usage": True}}
    # Small enough a limit that the hold of a request does not depend on the model's own.
    request |= {"max_tokens": max(shape.chunks, shape.answer_bytes // 4, 16)}
    content = shape.directive() + " "
    request["messages"] = [{"role": "user", "content": content}]
    room = prompt_bytes - len(msgspec.json.encode(request))
    request["messages"] = [{"role": "user", "content": content + words(seed, max(room, 1))}]
    return msgspec.json.encode(request)
