"""What a provider, a model and a price must be beyond their types and ranges (pure)."""

import ipaddress
import re
from collections.abc import Iterator
from decimal import Decimal
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import asdict, replace

from config.secret import Secret
from config.settings import Book, Keys, Model, Price, Provider, Server

PRICE = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?")
# billing.money refuses rates beyond this: amounts must fit a bigint.
PRICE_MAX = Decimal(100_000)
ENTRY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+~-]{0,127}")


def normalised(table: Struct) -> Struct:
    """Return the table in the one form the rest of the code relies on."""
    if isinstance(table, Provider):
        return replace(table, base_url=table.base_url.rstrip("/"))
    return table


def broken(table: Struct) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) for each rule the table breaks."""
    match table:
        case Provider():
            yield from _provider(table)
        case Model(routes=[]):
            yield "routes", "expected at least one route"
        case Price():
            yield from _price(table)
        case Server():
            for text in table.trusted_proxies:
                if not _is_network(text):
                    yield "trusted_proxies", "expected networks such as 10.0.0.0/8 or ::1/128"
        case Book():
            yield from _book(table)
        case Keys(encryption_key_previous=previous, encryption_key=key) if previous and not key:
            yield "encryption_key_previous", "needs encryption_key"
        case _:
            return


def wrong_secret(secret: Secret) -> str | None:
    """Say what makes a secret unusable wherever it is sent, without showing it."""
    if not secret.reveal().isprintable():
        return "contains a line break or another unprintable character"
    return None


def wrong_id(name: str) -> str | None:
    if ENTRY_ID.fullmatch(name):
        return None
    return "expected an id of letters, digits and . _ : / @ + ~ - (at most 128, no other first)"


def _provider(provider: Provider) -> Iterator[tuple[str, str]]:
    if provider.kind == "openai":
        wrong = _wrong_url(provider.base_url)
        if wrong:
            yield "base_url", wrong
        for key in ("delay_ms", "chunk_delay_ms", "output_tokens"):
            if getattr(provider, key) != getattr(Provider(kind="echo"), key):
                yield key, "only for kind echo"
    elif provider.base_url:
        yield "base_url", "not for kind echo"


def _wrong_url(url: str) -> str | None:
    if not url:
        return "required for kind openai"
    if not url.isprintable() or " " in url:
        return "expected a URL without spaces"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        return "expected an http:// or https:// URL"
    if "@" in parts.netloc:
        return "expected a URL without credentials (they belong in key)"
    if "?" in url or "#" in url:
        return "expected a URL without ? and #"
    return None


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _book(book: Book) -> Iterator[tuple[str, str]]:
    for key in ("request_url", "migrate_url"):
        if getattr(book, key) and not book.url:
            yield key, "needs url: the embedded book has its own login"
    if book.request_url and book.roles == "shared":
        yield "request_url", 'not for roles = "shared"'


def _price(price: Price) -> Iterator[tuple[str, str]]:
    for key, text in asdict(price).items():
        if text is None:
            continue
        if not PRICE.fullmatch(text):
            yield key, 'expected a plain decimal such as "2.50" (not negative, at most 9 decimals)'
        elif Decimal(text) > PRICE_MAX:
            yield key, f"expected at most {PRICE_MAX}"
