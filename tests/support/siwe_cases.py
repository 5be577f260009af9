"""Ways to sign in that must fail: what is changed in an otherwise good message or signature.

All of them are refused by looking alone, before anything is asked of a store, process or chain.
"""

from collections.abc import Callable
from typing import Any

from keys.siwe_signature import CURVE_ORDER
from tests.support.wallets import stamp

Nonce = dict[str, Any]
Parts = Callable[[Nonce], dict[str, Any]]
Change = Callable[[str], str]

_LINE = "\nVersion: 1"


def _domain(change: Change) -> Parts:
    return lambda nonce: {"domain": change(nonce["domain"])}


def _uri(change: Change) -> Parts:
    return lambda nonce: {"uri": change(nonce["uri"])}


def _is(**parts: Any) -> Parts:
    return lambda _: parts


def _now(parts: Callable[[], dict[str, Any]]) -> Parts:
    """Parts that name the time at which they are used."""
    return lambda _: parts()


# The signed text says something else.
PARTS: dict[str, Parts] = {
    "domain with a suffix": _domain(lambda d: d + ".evil.example"),
    "domain with a suffix to its port": _domain(lambda d: d + "0"),
    "domain with a prefix": _domain(lambda d: "evil-" + d),
    "domain as a subdomain": _domain(lambda d: "login." + d),
    "domain after a user": _domain(lambda d: "user@" + d),
    "domain as a user": _domain(lambda d: d + "@evil.example"),
    "domain with another port": _domain(lambda d: d.partition(":")[0] + ":444"),
    "domain in capitals": _domain(str.upper),
    "domain with a final dot": _domain(lambda d: d + "."),
    "domain with look-alike letters": _domain(lambda d: d.replace("o", "\u043e")),
    "domain in punycode": _domain(lambda d: "xn--" + d),
    "domain in percent-encoding": _domain(lambda d: "%6c" + d[1:]),
    "domain of somebody else": _is(domain="evil.example"),
    "domain with a path": _domain(lambda d: d + "/evil"),
    "domain with a line break": _domain(lambda d: "evil.example\n" + d),
    "domain that is empty": _is(domain=""),
    "domain that is too long": _is(domain="a" * 256),
    "scheme of another kind": _domain(lambda d: "ftp://" + d),
    "scheme in capitals": _domain(lambda d: "HTTP://" + d),
    "uri of somebody else": _is(uri="https://evil.example/"),
    "uri with a suffix": _uri(lambda u: u + ".evil.example"),
    "uri with a longer port": _uri(lambda u: u + "0"),
    "uri with a user": _uri(lambda u: u.replace("://", "://user@")),
    "uri that is a user": _uri(lambda u: u + "@evil.example"),
    "uri of another scheme": _uri(lambda u: "ftp" + u[u.index("://") :]),
    "uri in capitals": _uri(str.upper),
    "uri with a backslash": _uri(lambda u: u + "\\evil"),
    "uri with a space": _uri(lambda u: u + "/ evil"),
    "uri that is relative": _is(uri="/login"),
    "uri that is too long": _uri(lambda u: u + "/" + "a" * 512),
    "version 2": _is(version="2"),
    "version 01": _is(version="01"),
    "version 1.0": _is(version="1.0"),
    "chain that is not allowed": _is(chain_id=5),
    "chain 0": _is(chain_id=0),
    "chain with a leading zero": _is(chain_id="08453"),
    "chain in hexadecimal": _is(chain_id="0x2105"),
    "chain that is negative": _is(chain_id=-8453),
    "chain without end": _is(chain_id="9" * 400),
    "nonce that is short": _is(nonce="abc1234"),
    "nonce with punctuation": _is(nonce="abcd-1234-abcd"),
    "nonce that is long": _is(nonce="a" * 65),
    "issued too long ago": _now(lambda: {"issued_at": stamp(-301)}),
    "issued in the future": _now(lambda: {"issued_at": stamp(90)}),
    "issued on no day": _is(issued_at="2026-02-30T00:00:00Z"),
    "issued at no hour": _is(issued_at="2026-02-20T25:00:00Z"),
    "issued without a zone": _now(lambda: {"issued_at": stamp()[:-1]}),
    "issued in Unix time": _is(issued_at="1700000000"),
    "issued with a space": _now(lambda: {"issued_at": stamp().replace("T", " ")}),
    "expired": _now(lambda: {"issued_at": stamp(-60), "expiration_time": stamp(-1)}),
    "expires too late": _now(lambda: {"expiration_time": stamp(700)}),
    "expires on no day": _is(expiration_time="2026-13-01T00:00:00Z"),
    "not valid yet": _now(lambda: {"not_before": stamp(60)}),
    "statement with a line break": _is(statement="Sign in\nURI: https://evil.example"),
    "statement with a letter beyond ASCII": _is(statement="Sign in f\u00fcr Farebox."),
    "statement with a control character": _is(statement="Sign in\x00."),
    "statement that is too long": _is(statement="a" * 513),
    "request id with a space": _is(request_id="a b"),
    "resources without a scheme": _is(resources=["evil"]),
    "resources that are too many": _is(resources=["a:b"] * 17),
    "resources that are too long": _is(resources=["a:" + "b" * 500] * 3),
    "resources with a long host": _is(resources=["a://" + "1" * 100]),
}

# The signed text says the same in other bytes, or is no message at all.
TEXTS: dict[str, Change] = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"),
    "final line break": lambda text: text + "\n",
    "first line break": lambda text: "\n" + text,
    "final space": lambda text: text + " ",
    "byte order mark": lambda text: "\ufeff" + text,
    "two spaces": lambda text: text.replace("Version: 1", "Version:  1"),
    "no space": lambda text: text.replace("Version: 1", "Version:1"),
    "tab": lambda text: text.replace("Version: 1", "Version:\t1"),
    "small letters in a name": lambda text: text.replace("Version", "version"),
    "address in small letters": lambda text: text.replace(_address(text), _address(text).lower()),
    "address in capitals": lambda text: text.replace(
        _address(text), "0x" + _address(text)[2:].upper()
    ),
    "address with a wrong checksum": lambda text: text.replace(
        _address(text), "0x" + _address(text)[2:].swapcase()
    ),
    "address that is short": lambda text: text.replace(_address(text), _address(text)[:-1]),
    "address without 0x": lambda text: text.replace(_address(text), _address(text)[2:]),
    "address 0X": lambda text: text.replace("\n0x", "\n0X"),
    "other order": lambda text: text.replace(_LINE, "").replace("\nNonce", _LINE + "\nNonce"),
    "line twice": lambda text: text.replace(_LINE, _LINE * 2),
    "line of our own": lambda text: text + "\nAdmin: true",
    "no nonce": lambda text: "\n".join(ln for ln in text.split("\n") if "Nonce" not in ln),
    "no issued at": lambda text: "\n".join(ln for ln in text.split("\n") if "Issued" not in ln),
    "space for a percent sign": lambda text: text.replace("Sign in", "Sign%20in"),
    "digits of another script": lambda text: text.replace("Version: 1", "Version: \u0661"),
    "nothing but a line": lambda _: "hello",
    "oversized": lambda text: text + "\nResources:" + "\n- a:b" * 2000,
    "oversized line": lambda _: "a" * 8000,
    "many line breaks": lambda _: "\n" * 4000,
    "many resources in a row": lambda text: text + "\nResources:" + "\n- " * 1000,
    "many colons": lambda text: text.replace("URI: ", "URI: " + ":" * 3500),
    "many introductions": lambda text: text.split("\n")[0] * 40,
}


def _address(text: str) -> str:
    return text.split("\n")[1]


def _with(signature: str, r: int | None = None, s: int | None = None, v: int | None = None) -> str:
    raw = bytes.fromhex(signature[2:])
    r_bytes = raw[:32] if r is None else r.to_bytes(32, "big")
    s_bytes = raw[32:64] if s is None else s.to_bytes(32, "big")
    v_byte = raw[64] if v is None else v
    return "0x" + (r_bytes + s_bytes + bytes([v_byte])).hex()


def _high_s(signature: str) -> str:
    """The other valid signature of the same message."""
    raw = bytes.fromhex(signature[2:])
    return _with(signature, s=CURVE_ORDER - int.from_bytes(raw[32:64], "big"), v=55 - raw[64])


# The message is good, the signature is none that counts.
SIGNATURES: dict[str, Change] = {
    "high s": _high_s,
    "v 0": lambda signature: _with(signature, v=0),
    "v 1": lambda signature: _with(signature, v=1),
    "v 26": lambda signature: _with(signature, v=26),
    "v 29": lambda signature: _with(signature, v=29),
    "v 35": lambda signature: _with(signature, v=35),
    "v 255": lambda signature: _with(signature, v=255),
    "r 0": lambda signature: _with(signature, r=0),
    "s 0": lambda signature: _with(signature, s=0),
    "r beyond the order": lambda signature: _with(signature, r=CURVE_ORDER),
    "s beyond the order": lambda signature: _with(signature, s=CURVE_ORDER),
    "all zeros": lambda _: "0x" + "00" * 65,
    "64 bytes": lambda signature: signature[:-2],
    "66 bytes": lambda signature: signature + "00",
    "half a byte": lambda signature: signature[:-1],
    "no 0x": lambda signature: signature[2:],
    "0X": lambda signature: "0X" + signature[2:],
    "only 0x": lambda _: "0x",
    "no digits": lambda _: "0x" + "zz" * 65,
    "a space": lambda signature: signature[:10] + " " + signature[11:],
    "a final line break": lambda signature: signature + "\n",
    "digits of another script": lambda signature: signature[:-1] + "\u0661",
    "a contract's, cut off": lambda _: "0x" + "6492" * 16,
    "a contract's, of no words": lambda _: "0x" + "ab" * 99 + "6492" * 16,
    "a contract's, too long": lambda _: "0x" + "ab" * 8193,
}
