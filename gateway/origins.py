"""Where this gateway is, as a browser names it: sign-in messages and Origin headers must agree.

Without a public origin it is wherever somebody reached it on loopback, and nowhere else: a Host
header is a stranger's word.
"""

from collections.abc import Mapping

from config.rules import LOOPBACK_HOSTS, is_origin
from config.settings import Settings
from keys.errors import OriginMismatch

LOOPBACK_BINDS = ("127.0.0.1", "localhost", "::1")
SAFE_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS"))


def own_origin(settings: Settings, headers: Mapping[bytes, bytes]) -> str | None:
    """The origin of this gateway; None when nobody can sign in here."""
    if settings.identity.public_origin:
        return settings.identity.public_origin
    if settings.server.host not in LOOPBACK_BINDS:
        return None
    origin = f"http://{headers.get(b'host', b'').decode('latin-1')}"
    return origin if is_origin(origin) and is_loopback(origin) else None


def is_loopback(origin: str) -> bool:
    host = origin.partition("://")[2]
    return any(host == name or host.startswith(f"{name}:") for name in LOOPBACK_HOSTS)


def check_origin(settings: Settings, headers: Mapping[bytes, bytes]) -> None:
    """Raises OriginMismatch unless the request says that it comes from our own pages."""
    origin = own_origin(settings, headers)
    if origin is None or headers.get(b"origin") != origin.encode():
        raise OriginMismatch


def session_cookie(settings: Settings) -> str:
    """The name of the session cookie. Browsers hold `__Host-` to HTTPS, one host and all paths."""
    return "__Host-farebox" if is_secure(settings) else "farebox"


def login_cookie(settings: Settings) -> str:
    """The name of the cookie of somebody who is about to sign in."""
    return f"{session_cookie(settings)}-login"


def is_secure(settings: Settings) -> bool:
    return settings.identity.public_origin.startswith("https://")


def cookie_of(headers: Mapping[bytes, bytes], name: str) -> bytes | None:
    """The value of a cookie; None when it is not there, or there twice."""
    start = name.encode() + b"="
    parts = [part.strip() for part in headers.get(b"cookie", b"").split(b";")]
    values = [part[len(start) :] for part in parts if part.startswith(start)]
    return values[0] if len(values) == 1 else None
