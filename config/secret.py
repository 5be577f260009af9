"""A string that does not print itself."""

import hmac


class Secret:
    """A secret text: repr and str are `***`, only reveal() gives it out.

    There is no JSON form on purpose: encoding settings that hold one fails instead of leaking.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        """Compare in constant time; a plain string is never equal to a secret."""
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_bytes(self._value), _bytes(other._value))

    def __hash__(self) -> int:
        return hash((Secret, self._value))


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")
