"""Who a request acts for, resolved on the server from the credential alone. Pure."""

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

Permission = Literal["infer", "account", "payments"]
Window = Literal["day", "week", "month", "total"]

PERMISSIONS: tuple[Permission, ...] = ("infer", "account", "payments")
WINDOWS: tuple[Window, ...] = ("day", "week", "month", "total")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one account or key; None: what the settings say."""

    open_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What a virtual key may spend in each window of UTC; weeks begin on Monday."""

    nanos: int
    window: Window


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The account and virtual key behind a credential, with their limits.

    app_key_id is None for a session, which spends from the account's default virtual key.
    """

    account_id: UUID
    virtual_key_id: UUID
    app_key_id: UUID | None
    digest: bytes
    expires_at: datetime | None
    account_active: bool
    account_limits: Limits = Limits()
    key_limits: Limits = Limits()
    budget: Budget | None = None
    permissions: frozenset[Permission] = frozenset(PERMISSIONS)
    models: frozenset[str] | None = None
    """Public model ids that it may use; None: all of them."""
    ip_allow: tuple[str, ...] = ()
    """Networks that it may call from; none: from anywhere."""
    run_id: str = ""
    graph_id: str = ""
    """Of an execution grant: they go on its receipts."""
    upstream_keys: tuple[tuple[str, bytes], ...] = ()
    """Its own credentials for providers, by provider, encrypted."""

    def __repr__(self) -> str:
        return f"Principal(account={self.account_id}, key={self.app_key_id})"
