"""Headers by their names. What decides who calls may be said once only.

A proxy in front may have read the first of two, and let it pass; we would act on the last.
"""

from collections.abc import Sequence

from gateway.errors import NOT_CHARGED, ApiError

Header = tuple[bytes, bytes]

SINGLE = frozenset(
    (
        *(b"authorization", b"x-api-key", b"api-key", b"cookie", b"origin", b"host"),
        *(b"content-type", b"content-encoding", b"idempotency-key"),
    )
)


def by_name(headers: Sequence[Header]) -> dict[bytes, bytes]:
    """The headers, names in lower case; the last of those that may be repeated.

    Raises ApiError 400 for one that may not.
    """
    found = dict(headers)
    if len(found) != len(headers):
        _check(headers)
    return found


def _check(headers: Sequence[Header]) -> None:
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in seen and name in SINGLE:
            message = f"The header {name.decode()} was sent twice. {NOT_CHARGED}"
            raise ApiError(400, "invalid_request", message)
        seen.add(name)
