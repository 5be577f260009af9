"""Where a provider is asked and what every request to it says, checked and encoded once."""

import ipaddress
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, urlsplit

_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.!#$%&'*+^`|~")
_HOST_CHARS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_PATH_SAFE = "/%:@!$&'()*+,;=~"
# Framing and routing are the client's own.
_OURS = frozenset({"connection", "content-length", "expect", "host", "te", "transfer-encoding"})
# A head ends in the middle of this line: the length is that of each body.
HEAD_END = b"content-length: "
_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Requests to the same one share connections."""

    is_tls: bool
    host: str
    port: int


def read_url(url: str) -> tuple[Origin, bytes]:
    """(origin, path with query) of an http:// or https:// URL. Raises ValueError."""
    if not url.isprintable() or " " in url:
        raise ValueError("the URL has spaces or control characters")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.port == 0:
        raise ValueError("expected an http:// or https:// URL")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("expected a URL without credentials and without #")
    origin = Origin(
        parts.scheme == "https", _host(parts.hostname), parts.port or _PORTS[parts.scheme]
    )
    query = f"?{quote(parts.query, _PATH_SAFE + '?')}" if parts.query else ""
    return origin, (quote(parts.path or "/", _PATH_SAFE) + query).encode()


def request_head(origin: Origin, path: bytes, headers: Mapping[str, str]) -> bytes:
    """A POST up to `content-length: `. Raises ValueError that names the header, never its value."""
    lines = [b"POST %b HTTP/1.1" % path, b"host: " + _authority(origin).encode()]
    for name, value in headers.items():
        if not name or not _NAME_CHARS.issuperset(name.lower()) or name.lower() in _OURS:
            raise ValueError(f"the header {name!r} cannot be sent")
        if not value.isprintable() or value != value.strip():
            raise ValueError(f"the header {name!r} has a value that cannot be sent")
        lines.append(f"{name}: {value}".encode())
    lines.append(HEAD_END)
    return b"\r\n".join(lines)


def _host(host: str) -> str:
    if ":" in host:
        return str(ipaddress.ip_address(host))
    if not host.isascii():
        host = host.encode("idna").decode()
    labels = host.removesuffix(".").split(".")
    if not _HOST_CHARS.issuperset(host) or not all(0 < len(label) < 64 for label in labels):
        raise ValueError("the URL has no valid host name")
    return host


def _authority(origin: Origin) -> str:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    is_default = origin.port == _PORTS["https" if origin.is_tls else "http"]
    return host if is_default else f"{host}:{origin.port}"
