"""Every setting, its unit (in the name), its default and its range.

Rules between several settings stand in rules.py, reading them in load.py. farebox.toml shows all of
them to operators, and a test keeps it equal to the defaults here.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from config.secret import Secret

# Lua numbers and 32-bit socket options read some of these: two thousand million is enough for all.
INT_MAX = 2_147_483_647
DAY_S = 86_400

Positive = Annotated[int, Meta(ge=1, le=INT_MAX)]
NotNegative = Annotated[int, Meta(ge=0, le=INT_MAX)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Workers = Annotated[int, Meta(ge=1, le=1024)]
WholeSeconds = Annotated[int, Meta(ge=1, le=DAY_S)]
Milliseconds = Annotated[int, Meta(ge=1, le=DAY_S * 1000)]
DelayMs = Annotated[int, Meta(ge=0, le=DAY_S * 1000)]
Seconds = Annotated[float, Meta(gt=0, le=DAY_S)]
Percent = Annotated[int, Meta(ge=1, le=100)]
# Below 10,000 the user price is below the provider cost: every request would lose money.
MarkupBps = Annotated[int, Meta(ge=10_000, le=1_000_000)]
SessionSeconds = Annotated[int, Meta(ge=60, le=30 * DAY_S)]
SessionCount = Annotated[int, Meta(ge=1, le=1000)]
PerMinute = Annotated[int, Meta(ge=1, le=1000)]
ChainId = Annotated[int, Meta(ge=1, le=INT_MAX)]
Text = Annotated[str, Meta(min_length=1, max_length=256)]

KIB = 1024
MIB = 1024 * KIB


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file."""


class Server(Table, frozen=True, kw_only=True):
    """Where `farebox serve` listens and how it stops; port 0 takes a free one."""

    host: Text = "127.0.0.1"
    port: Port = 8080
    workers: Workers = 1
    pin_workers: bool = False
    drain_timeout_s: WholeSeconds = 120
    keepalive_timeout_s: WholeSeconds = 75
    trusted_proxies: tuple[Text, ...] = ()


class Book(Table, frozen=True, kw_only=True):
    """The ledger in Postgres; an empty url means the embedded one.

    `shared` roles are for development: one login that acts as both (billing/roles.py).
    """

    url: Secret = Secret()
    request_url: Secret = Secret()
    migrate_url: Secret = Secret()
    roles: Literal["separate", "shared"] = "separate"
    pool_size_max: Positive = 4
    request_pool_size_max: Positive = 2
    connect_timeout_s: WholeSeconds = 5
    statement_timeout_ms: Milliseconds = 5000
    commit_batch_max: Positive = 256
    commit_gather_ms: DelayMs = 10
    receipts_pending_max: Positive = 50_000
    pending_age_max_s: WholeSeconds = 900
    spool_dir: str = ""


class Till(Table, frozen=True, kw_only=True):
    """The holds in Valkey or Redis; an empty url means the embedded one."""

    url: Secret = Secret()
    call_timeout_ms: Milliseconds = 50
    stall_timeout_ms: Milliseconds = 1000
    calls_pending_max: Positive = 10_000
    hold_lease_s: WholeSeconds = 30
    renew_every_s: Seconds = 5.0
    rebuild_wait_ms: Milliseconds = 2000


class Work(Table, frozen=True, kw_only=True):
    """What `farebox work` does: ends what dead workers left, posts what nobody posted."""

    in_serve: bool = True
    every_s: Seconds = 5.0
    sweep_grace_s: Seconds = 15.0
    takeover_after_s: Seconds = 10.0
    audit_every_s: Seconds = 60.0


class Keys(Table, frozen=True, kw_only=True):
    """API keys: their kind, the pepper of their digests, what seals others' keys, the cache."""

    mode: Literal["live", "test"] = "live"
    pepper: Secret = Secret()
    pepper_previous: Secret = Secret()
    encryption_key: Secret = Secret()
    encryption_key_previous: Secret = Secret()
    cache_ttl_ms: Milliseconds = 4000
    cache_entries_max: Positive = 100_000
    per_account_max: Positive = 1000


class Identity(Table, frozen=True, kw_only=True):
    """Who may sign in with a wallet, where, and for how long a session lasts."""

    public_origin: str = ""
    chain_ids: tuple[ChainId, ...] = (8453, 1)
    session_ttl_s: SessionSeconds = 12 * 3600
    session_idle_s: SessionSeconds = 3600
    contract_session_ttl_s: SessionSeconds = 3600
    sessions_per_user_max: SessionCount = 20
    tries_per_address_per_minute: PerMinute = 60
    tries_per_wallet_per_minute: PerMinute = 10
    verify_timeout_s: WholeSeconds = 10
    verifies_pending_max: Positive = 64


class Chain(Table, frozen=True, kw_only=True):
    """The chain that contract wallets are asked on; without an RPC they cannot sign in.

    Payments in the token (USDC) go to the treasury; without both, nobody can pay in.
    """

    id: ChainId = 8453
    token: str = ""
    treasury: str = ""
    rpc_urls: Secret = Secret()
    timeout_s: Seconds = 3.0


class Billing(Table, frozen=True, kw_only=True):
    """What users pay above the provider cost, and what happens to a model without a price."""

    markup_bps: MarkupBps = 20_000
    unpriced: Literal["refuse", "free"] = "refuse"
    prices_refresh_s: WholeSeconds = 30


class Limits(Table, frozen=True, kw_only=True):
    """Bounds on size and concurrency."""

    body_bytes_max: Positive = 8 * MIB
    bodies_bytes_max: Positive = 256 * MIB
    headers_bytes_max: Positive = 16 * KIB
    response_bytes_max: Positive = 32 * MIB
    stream_buffer_bytes_max: Positive = 256 * KIB
    open_requests_per_key: Positive = 50
    open_requests_per_account: Positive = 200
    open_requests_per_worker: Positive = 1000
    requests_per_minute_per_key: NotNegative = 0
    requests_per_minute_per_account: NotNegative = 0
    tokens_per_minute_per_key: NotNegative = 0
    tokens_per_minute_per_account: NotNegative = 0
    open_grants_per_account: Positive = 1000
    drain_bytes_max: Positive = 64 * KIB
    drains_max: Positive = 200
    loop_lag_max_ms: Milliseconds = 20
    loop_lag_for_ms: Milliseconds = 1000
    memory_percent_max: Percent = 80
    stream_window_tokens: NotNegative = 4096
    output_tokens_min: Positive = 256


class Timeouts(Table, frozen=True, kw_only=True):
    """How long each step of a request may take."""

    headers_s: Seconds = 10.0
    body_s: Seconds = 30.0
    upstream_connect_s: Seconds = 10.0
    upstream_first_byte_s: Seconds = 120.0
    upstream_chunk_s: Seconds = 60.0
    write_stall_s: Seconds = 30.0
    request_total_s: Seconds = 900.0
    drain_s: Seconds = 5.0
    keepalive_comment_s: Seconds = 10.0


class Log(Table, frozen=True, kw_only=True):
    """JSON log lines; an empty path means stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    path: str = ""


class Metrics(Table, frozen=True, kw_only=True):
    """Who may read /metrics: the bearer of the token, or everybody when open."""

    token: Secret = Secret()
    open: bool = False


class Provider(Table, frozen=True, kw_only=True):
    """One upstream: `openai` is anything compatible with it, `echo` answers by itself."""

    kind: Literal["openai", "echo"]
    base_url: str = ""
    key: Secret = Secret()
    reported_cost: bool = True
    first_byte_timeout_s: Seconds | None = None
    delay_ms: DelayMs = 0
    chunk_delay_ms: DelayMs = 0
    output_tokens: Positive = 32


class Route(Table, frozen=True, kw_only=True):
    """One way to serve a model; an empty model name means the public id."""

    provider: Text
    model: str = ""


class Price(Table, frozen=True, kw_only=True):
    """US dollars per million tokens, as decimal strings: money is never a float."""

    input_usd_per_mtok: str
    output_usd_per_mtok: str
    cached_input_usd_per_mtok: str | None = None
    cache_write_usd_per_mtok: str | None = None
    reasoning_usd_per_mtok: str | None = None
    audio_input_usd_per_mtok: str | None = None
    audio_output_usd_per_mtok: str | None = None


class Model(Table, frozen=True, kw_only=True):
    """One public model: routes in order, price and size; 0 image tokens refuses image parts."""

    routes: list[Route]
    price: Price | None = None
    markup_bps: MarkupBps | None = None
    context_tokens: Positive = 128_000
    output_tokens_max: Positive = 16_384
    image_tokens_max: NotNegative = 0
    stream_window_tokens: NotNegative | None = None
    owned_by: Text = "farebox"


class Settings(Table, frozen=True, kw_only=True):
    """Everything that can be set."""

    server: Server = Server()
    book: Book = Book()
    till: Till = Till()
    work: Work = Work()
    keys: Keys = Keys()
    identity: Identity = Identity()
    chain: Chain = Chain()
    billing: Billing = Billing()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    log: Log = Log()
    metrics: Metrics = Metrics()
    providers: dict[str, Provider] = {}
    models: dict[str, Model] = {}
