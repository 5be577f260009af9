import pytest

from config.errors import ConfigError
from config.load import load
from config.rules import is_origin, rpc_urls, token_address
from config.secret import Secret

ECHO = {"providers.echo": {"kind": "echo"}}
ROUTES = {"routes": [{"provider": "echo"}]}


def problems(overrides: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(None, {}, overrides)
    return tuple(problem.removesuffix(" (flag)") for problem in caught.value.problems)


@pytest.mark.parametrize(
    "url", ["https://a.example/v1", "https://a.example/v1/", "http://h:1/v1//"]
)
def test_a_base_url_loses_its_trailing_slashes(url):
    loaded = load(None, {}, {"providers.p": {"kind": "openai", "base_url": url}})

    assert loaded.settings.providers["p"].base_url == url.rstrip("/")


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("", "required for kind openai"),
        ("api.openai.com/v1", "expected an http:// or https:// URL"),
        ("ftp://a/v1", "expected an http:// or https:// URL"),
        ("https:///v1", "expected an http:// or https:// URL"),
        ("https://a:99999/v1", "expected an http:// or https:// URL"),
        ("https://[::1/v1", "expected an http:// or https:// URL"),
        ("https://a/v1?key=1", "expected a URL without ? and #"),
        ("https://user:pw@a/v1", "expected a URL without credentials (they belong in key)"),
        ("https://a/v 1", "expected a URL without spaces"),
        ("https://a/\r\nx: y", "expected a URL without spaces"),
    ],
)
def test_an_unusable_base_url_is_refused(url, wrong):
    assert problems({"providers.p": {"kind": "openai", "base_url": url}}) == (
        f"providers.p.base_url: {wrong}",
    )


def test_what_belongs_to_one_kind_is_refused_for_the_other():
    assert problems(
        {
            "providers.e": {"kind": "echo", "base_url": "http://a"},
            "providers.o": {"kind": "openai", "base_url": "http://a", "delay_ms": 1},
        }
    ) == (
        "providers.e.base_url: not for kind echo",
        "providers.o.delay_ms: only for kind echo",
    )


@pytest.mark.parametrize("price", ["0", "0.000000001", "2.50", "100000", "100000.000000000"])
def test_a_plain_decimal_is_a_price(price):
    given = {"input_usd_per_mtok": price, "output_usd_per_mtok": price}

    loaded = load(None, {}, {**ECHO, "models.m": {**ROUTES, "price": given}})

    price_set = loaded.settings.models["m"].price
    assert price_set is not None
    assert price_set.input_usd_per_mtok == price


@pytest.mark.parametrize(
    "price",
    [
        *("", "-1", "1e3", "NaN", "Infinity", "1_0", " 1", "1\n", "1,5", "\u0663", ".5", "1."),
        *("0.0000000001", "100001", "99999999999", "100000.000000001", 2.5, 1),
    ],
)
def test_anything_else_is_not_a_price(price):
    given = {"input_usd_per_mtok": "1", "output_usd_per_mtok": "1", "reasoning_usd_per_mtok": price}

    (problem,) = problems({**ECHO, "models.m": {**ROUTES, "price": given}})

    assert problem.startswith("models.m.price.reasoning_usd_per_mtok: expected ")


def test_a_price_needs_input_and_output():
    assert problems({**ECHO, "models.m": {**ROUTES, "price": {}}}) == (
        "models.m.price.input_usd_per_mtok: required",
        "models.m.price.output_usd_per_mtok: required",
    )


def test_a_model_needs_a_route_and_each_route_a_provider_that_exists():
    routes = [{"provider": "ehco"}, {"model": "x"}, 3, {"provider": "echo", "modle": "x"}]

    assert problems({**ECHO, "models.a": {"routes": []}, "models.b": {"routes": routes}}) == (
        "models.b.routes.1.provider: required",
        "models.b.routes.2: expected a table, got int",
        "models.b.routes.3.modle: unknown key (did you mean model?)",
        "models.a.routes: expected at least one route",
    )
    assert problems({**ECHO, "models.b": {"routes": routes[:1], "markup_bps": 1}}) == (
        "models.b.markup_bps: expected int >= 10000",
        "models.b.routes.0.provider: no such provider (did you mean echo?)",
    )


@pytest.mark.parametrize(
    "name", ["gpt-4.1", "meta/llama:free", "accounts/x/models/y@2024", "A+b~c"]
)
def test_model_ids_may_contain_what_providers_use(name):
    assert name in load(None, {}, {**ECHO, "models": {name: ROUTES}}).settings.models


@pytest.mark.parametrize("name", ["", "/x", "a b", "a\nb", "é", "x" * 129, 'a"b'])
def test_other_ids_are_refused(name):
    (problem,) = problems({**ECHO, "models": {name: ROUTES}})

    assert "expected an id of letters, digits" in problem
    assert "\n" not in problem


def test_networks_of_proxies_are_networks():
    networks = ["10.0.0.0/8", "192.0.2.1", "fd00::/8", "::1/128"]
    loaded = load(None, {}, {"server.trusted_proxies": networks})

    assert loaded.settings.server.trusted_proxies == tuple(networks)
    expected = "server.trusted_proxies: expected networks such as 10.0.0.0/8 or ::1/128"
    for wrong in ("10.0.0.1/8", "proxy.example", "10.0.0.0/33", "*"):
        assert problems({"server.trusted_proxies": [wrong]}) == (expected,)


def test_networks_of_proxies_come_from_the_environment_as_json():
    environ = {"FAREBOX_SERVER__TRUSTED_PROXIES": '["10.0.0.0/8", "::1/128"]'}

    assert load(None, environ).settings.server.trusted_proxies == ("10.0.0.0/8", "::1/128")


@pytest.mark.parametrize(
    ("origin", "is_one"),
    [
        ("https://farebox.example", True),
        ("https://farebox.example:8443", True),
        ("http://localhost:8080", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:8080", True),
        ("http://farebox.example", False),
        ("https://farebox.example/", False),
        ("https://farebox.example:443", False),
        ("http://localhost:80", False),
        ("https://Farebox.example", False),
        ("https://user@farebox.example", False),
        ("https://f\u00e4rebox.example", False),
        ("https://farebox.example:70000", False),
        ("http://localhost.evil.example", False),
        ("https://" + "a" * 300, False),
        ("farebox.example", False),
    ],
)
def test_an_origin_is_written_as_browsers_write_it(origin, is_one):
    assert is_origin(origin) is is_one


def test_identity_and_chain_are_held_to_their_rules():
    nodes = Secret("https://node.example/key, ,http://127.0.0.1:8545")

    (problem,) = problems({"identity.public_origin": "https://a.example/b"})
    assert problem.startswith("identity.public_origin: expected https://host[:port], or http://")
    (problem,) = problems({"chain.rpc_urls": Secret("https://a.example,ftp://b.example")})
    assert problem == "chain.rpc_urls: expected http:// or https:// URLs, separated by commas"
    loaded = load(None, {"FAREBOX_IDENTITY__CHAIN_IDS": "[1, 10]"}, {"chain.rpc_urls": nodes})
    assert rpc_urls(loaded.settings.chain) == ["https://node.example/key", "http://127.0.0.1:8545"]
    assert loaded.settings.identity.chain_ids == (1, 10)


def test_logins_without_a_book_of_ones_own_or_beside_a_shared_one_are_refused():
    url = Secret("postgresql://u@h/d")

    assert problems({"book.request_url": url, "book.migrate_url": url}) == (
        "book.request_url: needs url: the embedded book has its own login",
        "book.migrate_url: needs url: the embedded book has its own login",
    )
    assert problems({"book.url": url, "book.request_url": url, "book.roles": "shared"}) == (
        'book.request_url: not for roles = "shared"',
    )


def test_a_previous_encryption_key_needs_a_present_one():
    assert problems({"keys.encryption_key_previous": Secret("x")}) == (
        "keys.encryption_key_previous: needs encryption_key",
    )


TREASURY = "0x7e7e7e7E7e7E7e7e7e7E7e7e7e7E7e7e7e7e7e7E"
NODES = Secret("https://a.example/key, https://b.example/key")
PAYMENTS = {"chain.treasury": TREASURY, "chain.rpc_urls": NODES}


def test_payments_need_a_treasury_and_two_nodes():
    chain = load(None, {}, PAYMENTS).settings.chain

    assert token_address(chain) == "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"
    sepolia = load(None, {}, {**PAYMENTS, "chain.id": 84532}).settings.chain
    assert token_address(sepolia) == "0x036CbD53842c5426634e7929541eC2318f3dCF7e"
    alone = {"chain.rpc_urls": Secret("https://a.example"), "chain.development": True}
    assert load(None, {}, PAYMENTS | alone).settings.chain.development


CHECKSUM = "expected an address in its checksum form (EIP-55), not zero"
TWO_NODES = "payments need two nodes of two providers (development: one)"


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"treasury": TREASURY.lower()}, f"treasury: {CHECKSUM}"),
        ({"treasury": TREASURY[:-1]}, f"treasury: {CHECKSUM}"),
        ({"treasury": TREASURY + "\n"}, f"treasury: {CHECKSUM}"),
        ({"treasury": "0x" + "0" * 40}, f"treasury: {CHECKSUM}"),
        ({"token": TREASURY.upper()}, f"token: {CHECKSUM}"),
        ({"sweep_addresses": ["0x12"]}, f"sweep_addresses: {CHECKSUM}"),
        ({"token": TREASURY}, "treasury: expected an address that is not the token's"),
        ({"id": 31337}, "token: required for payments on chain 31337"),
        ({"rpc_urls": Secret()}, f"rpc_urls: {TWO_NODES}"),
        ({"rpc_urls": Secret("https://a.example")}, f"rpc_urls: {TWO_NODES}"),
        ({"rpc_urls": Secret("https://a.example,https://a.example")}, f"rpc_urls: {TWO_NODES}"),
        (
            {"rpc_urls": Secret("http://a,http://b,http://a")},
            "rpc_urls: expected every node once",
        ),
        ({"rpc_urls": Secret(), "development": True}, f"rpc_urls: {TWO_NODES}"),
    ],
)
def test_what_would_lose_payments_is_refused(changed, wrong):
    overrides = {f"chain.{key}": value for key, value in changed.items()}

    assert problems(PAYMENTS | overrides) == (f"chain.{wrong}",)
