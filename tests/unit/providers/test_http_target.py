"""What may be asked of whom: checked once, and never shown when it is refused."""

import pytest

from gateway.providers.http_target import Origin, read_url, request_head

ORIGIN = Origin(True, "api.example", 443)


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("http://a", (False, "a", 80), b"/"),
        ("https://A.Example/v1/x", (True, "a.example", 443), b"/v1/x"),
        ("https://a:444/v1?b=c&d=%20", (True, "a", 444), b"/v1?b=c&d=%20"),
        ("http://[::1]:8080/", (False, "::1", 8080), b"/"),
        ("http://[0:0::1]/", (False, "::1", 80), b"/"),
        ("http://bücher.example/é", (False, "xn--bcher-kva.example", 80), b"/%C3%A9"),
        ("http://a_b.example./", (False, "a_b.example.", 80), b"/"),
    ],
)
def test_a_url_is_an_origin_and_a_path(
    url: str, origin: tuple[bool, str, int], path: bytes
) -> None:
    assert read_url(url) == (origin, path)


@pytest.mark.parametrize(
    "url",
    [
        *("", "a", "//a", "ftp://a", "http://", "http:///x", "http://a:0", "http://a:99999"),
        *("http://a:b", "http://a b", "http://a/\r\nx: y", "http://a\n", "http://a/\0"),
        *("http://u:p@a/", "http://a/#f", "http://a..b", "http://" + "a" * 64, "http://[zz]/"),
        *("http://a;b/", "http://a%20b/", "http://" + "ü" * 64),
    ],
)
def test_a_url_that_cannot_be_asked(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_url(url)


def test_the_head_ends_before_the_length() -> None:
    head = request_head(ORIGIN, b"/v1", {"Accept": "x/y", "x-name": "Zoë"})

    assert head == (
        b"POST /v1 HTTP/1.1\r\nhost: api.example\r\nAccept: x/y\r\n"
        b"x-name: Zo\xc3\xab\r\ncontent-length: "
    )


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (Origin(False, "a", 80), b"a"),
        (Origin(False, "a", 443), b"a:443"),
        (Origin(True, "a", 443), b"a"),
        (Origin(True, "::1", 443), b"[::1]"),
        (Origin(True, "::1", 8443), b"[::1]:8443"),
    ],
)
def test_the_host_has_a_port_when_it_is_not_the_usual_one(origin: Origin, host: bytes) -> None:
    assert b"\r\nhost: %b\r\n" % host in request_head(origin, b"/", {})


@pytest.mark.parametrize(
    "value", ["s3cret\r\nx: y", "s3cret\n", "s3cret\r", "s3cret\0", " s3cret", "s3cret ", "s3\x7f"]
)
def test_a_value_that_cannot_be_sent_is_not_shown(value: str) -> None:
    with pytest.raises(ValueError, match="'x-key' has a value that cannot be sent") as caught:
        request_head(ORIGIN, b"/", {"x-key": value})

    assert "s3" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "a b", "a:", "a\r\n", "ä", "Host", "content-length", "Transfer-Encoding", "te"]
)
def test_a_name_that_cannot_be_sent(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        request_head(ORIGIN, b"/", {name: "x"})
