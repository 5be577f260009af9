"""What a provider, a model and a price must be beyond their types and ranges (pure)."""

import ipaddress
import re
from collections.abc import Iterator
from decimal import Decimal
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import asdict, replace

from config.secret import Secret
from config.settings import Book, Chain, Identity, Keys, Model, Price, Provider, Server

PRICE = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?")
# billing.money refuses rates beyond this: amounts must fit a bigint.
PRICE_MAX = Decimal(100_000)
# Lower case and ASCII, without what a browser would leave out of an Origin header.
ORIGIN = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
)
ORIGIN_LENGTH_MAX = 255
# https://developers.circle.com/stablecoins/usdc-contract-addresses
USDC = {
    8453: "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913",
    84532: "0x036CbD53842c5426634e7929541eC2318f3dCF7e",
}
ZERO_ADDRESS = "0x" + "0" * 40
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
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
        case Server() if not all(map(_is_network, table.trusted_proxies)):
            yield "trusted_proxies", "expected networks such as 10.0.0.0/8 or ::1/128"
        case Identity() if table.public_origin and not is_origin(table.public_origin):
            yield (
                "public_origin",
                "expected https://host[:port], or http:// on loopback, in lower case",
            )
        case Chain():
            yield from _chain(table)
        case Book():
            yield from _book(table)
        case Keys(encryption_key_previous=previous, encryption_key=key) if previous and not key:
            yield "encryption_key_previous", "needs encryption_key"
        case _:
            return


def is_origin(text: str) -> bool:
    """True for an origin as browsers write it, that may be signed in at."""
    found = ORIGIN.fullmatch(text)
    if found is None or len(text) > ORIGIN_LENGTH_MAX:
        return False
    scheme, host, port = found["scheme"], found["host"], found["port"]
    if port is not None and not 0 < int(port) < 65_536:
        return False
    # Browsers leave out the port that goes without saying.
    is_plain = port != {"http": "80", "https": "443"}[scheme]
    return is_plain and (scheme == "https" or host in LOOPBACK_HOSTS)


def rpc_urls(chain: Chain) -> list[str]:
    """The nodes of a chain, in the order in which they are asked."""
    return [url for part in chain.rpc_urls.reveal().split(",") if (url := part.strip())]


def token_address(chain: Chain) -> str:
    """The token that payments are made in; empty when it is not known."""
    return chain.token or USDC.get(chain.id, "")


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


def _chain(chain: Chain) -> Iterator[tuple[str, str]]:
    for url in rpc_urls(chain):
        if wrong := _wrong_node(url):
            yield "rpc_urls", wrong
    named = {"token": chain.token, "treasury": chain.treasury}
    for key, address in [*named.items(), *(("sweep_addresses", a) for a in chain.sweep_addresses)]:
        if address and not _is_address(address):
            yield key, "expected an address in its checksum form (EIP-55), not zero"
    if chain.treasury:
        yield from _treasury(chain)


def _is_address(text: str) -> bool:
    from config.address import is_checksummed  # costs 20 ms: only where there are addresses

    return is_checksummed(text) and text != ZERO_ADDRESS


def _treasury(chain: Chain) -> Iterator[tuple[str, str]]:
    """What taking payments needs besides a treasury."""
    if not token_address(chain):
        yield "token", f"required for payments on chain {chain.id}"
    if chain.treasury == token_address(chain):
        yield "treasury", "expected an address that is not the token's"
    urls = rpc_urls(chain)
    # One node could be lied to, or lie, about money. The same one twice is one.
    if len(set(urls)) < (1 if chain.development else 2):
        yield "rpc_urls", "payments need two nodes of two providers (development: one)"
    elif len(set(urls)) < len(urls):
        yield "rpc_urls", "expected every node once"


def _wrong_node(url: str) -> str | None:
    """Unlike a provider's, the URL of a node often carries its credential."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or " " in url:
        return "expected http:// or https:// URLs, separated by commas"
    return None


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
