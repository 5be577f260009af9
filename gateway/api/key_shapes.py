"""API keys as they are asked for and shown over HTTP."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from billing.windows import window_end, window_start
from config.ids import id_text
from gateway.api.body import refuse
from gateway.api.shapes import Amount, Count, Line, Money, read_amount
from gateway.catalog import Catalog
from keys.api_key import Kind
from keys.keys_store import KeyChanges, KeyRecord
from keys.principal import Budget, Limits, Permission, Window
from keys.store import KeyTerms
from keys.terms import (
    MODELS_MAX,
    NETWORK_CHARS_MAX,
    NETWORKS_MAX,
    OVERLAP_S_MAX,
    check_expiry,
    read_networks,
)

T = TypeVar("T")

Moment = Annotated[datetime, Meta(tz=True)]
ModelId = Annotated[str, Meta(min_length=1, max_length=256)]
Models = Annotated[list[ModelId], Meta(min_length=1, max_length=MODELS_MAX)]
Network = Annotated[str, Meta(min_length=1, max_length=NETWORK_CHARS_MAX)]
Networks = Annotated[list[Network], Meta(min_length=1, max_length=NETWORKS_MAX)]
Scopes = Annotated[list[Permission], Meta(min_length=1, max_length=3)]
OverlapS = Annotated[int, Meta(ge=0, le=OVERLAP_S_MAX)]


class BudgetWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be spent in each window of UTC."""

    credits: Amount
    window: Window

    def read(self) -> Budget:
        return Budget(nanos=read_amount(self.credits, "budget.credits"), window=self.window)


class KeyWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key to make. What is left out is not limited."""

    name: Line
    expires_at: Moment | None = None
    budget: BudgetWish | None = None
    rpm: Count | None = None
    tpm: Count | None = None
    max_concurrency: Count | None = None
    models: Models | None = None
    ip_allow: Networks | None = None
    scopes: Scopes = msgspec.field(default_factory=lambda: ["infer", "account"])

    def read(self, catalog: Catalog, kind: Kind) -> KeyTerms:
        """Raises ApiError 400."""
        return KeyTerms(
            name=self.name,
            kind=kind,
            expires_at=None if self.expires_at is None else _expiry(self.expires_at),
            limits=Limits(
                open_requests=self.max_concurrency,
                requests_per_minute=self.rpm,
                tokens_per_minute=self.tpm,
            ),
            budget=None if self.budget is None else self.budget.read(),
            permissions=_once(self.scopes),
            models=None if self.models is None else _models(self.models, catalog),
            ip_allow=None if self.ip_allow is None else _networks(self.ip_allow),
        )


class KeyPatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes of a key. What is left out stays as it is, null takes a limit away."""

    name: Line | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    budget: BudgetWish | UnsetType | None = UNSET
    rpm: Count | UnsetType | None = UNSET
    tpm: Count | UnsetType | None = UNSET
    max_concurrency: Count | UnsetType | None = UNSET
    models: Models | UnsetType | None = UNSET
    ip_allow: Networks | UnsetType | None = UNSET
    scopes: Scopes | UnsetType = UNSET

    def read(self, catalog: Catalog) -> KeyChanges:
        """Raises ApiError 400."""
        return KeyChanges(
            name=self.name,
            expires_at=_expiry(self.expires_at) if self.expires_at else self.expires_at,
            budget=self.budget.read() if isinstance(self.budget, BudgetWish) else self.budget,
            permissions=_once(self.scopes) if self.scopes else UNSET,
            models=_models(self.models, catalog) if self.models else self.models,
            ip_allow=_networks(self.ip_allow) if self.ip_allow else self.ip_allow,
            open_requests=self.max_concurrency,
            requests_per_minute=self.rpm,
            tokens_per_minute=self.tpm,
        )


class RotationWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For how many seconds the old secret works besides the new one: a week at most."""

    overlap_s: OverlapS = 0


def _expiry(expires_at: datetime) -> datetime:
    try:
        check_expiry(expires_at, datetime.now(UTC))
    except ValueError as exc:
        raise refuse(str(exc), "expires_at") from None
    return expires_at


def _networks(texts: Sequence[str]) -> tuple[str, ...]:
    try:
        return read_networks(texts)
    except ValueError as exc:
        raise refuse(str(exc), "ip_allow") from None


def _models(names: Sequence[str], catalog: Catalog) -> tuple[str, ...]:
    for number, name in enumerate(names):
        if catalog.find(name) is None:
            nearest = catalog.nearest(name)
            hint = f"Did you mean {', '.join(nearest)}?" if nearest else "See GET /v1/models."
            raise refuse(f"There is no such model. {hint}", f"models[{number}]")
    return _once(names)


def _once(values: Sequence[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


class BudgetShown(msgspec.Struct, frozen=True, kw_only=True):
    """A budget and what is left of it. resets_at is null for a total."""

    credits: str
    usd: str
    window: Window
    spent: Money
    remaining: Money
    resets_at: datetime | None


class LimitsShown(msgspec.Struct, frozen=True, kw_only=True):
    """null: what holds for all keys."""

    rpm: int | None
    tpm: int | None
    max_concurrency: int | None


class KeyShown(msgspec.Struct, frozen=True, kw_only=True):
    """An API key without its secret."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    hint: str
    """The secret's beginning and end."""
    status: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    rotated_at: datetime | None
    previous_expires_at: datetime | None
    """Until when the secret before the last rotation works; null: it does not."""
    budget: BudgetShown | None
    limits: LimitsShown
    models: list[str] | None
    ip_allow: list[str] | None
    scopes: list[Permission]


class KeyWithSecret(KeyShown, frozen=True, kw_only=True):
    """An API key whose secret is shown now and never again."""

    key: str


def spending_since(records: Sequence[KeyRecord], now: datetime) -> dict[UUID, datetime]:
    """For each virtual key with a budget: when the window of now began."""
    return {
        record.virtual_key_id: window_start(record.budget.window, now)
        for record in records
        if record.budget is not None
    }


def show_key(record: KeyRecord, spent_nanos: int, now: datetime) -> KeyShown:
    """spent_nanos: in the budget's window of now."""
    limits, previous = record.limits, record.previous_expires_at
    is_revoked = record.status == "revoked"
    is_expired = record.expires_at is not None and record.expires_at <= now
    return KeyShown(
        id=f"key_{id_text(record.id)}",
        name=record.name,
        hint=record.hint,
        status="revoked" if is_revoked else "expired" if is_expired else "active",
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
        rotated_at=record.rotated_at,
        previous_expires_at=previous if previous is not None and previous > now else None,
        budget=None if record.budget is None else show_budget(record.budget, spent_nanos, now),
        limits=LimitsShown(
            rpm=limits.requests_per_minute,
            tpm=limits.tokens_per_minute,
            max_concurrency=limits.open_requests,
        ),
        models=None if record.models is None else list(record.models),
        ip_allow=None if record.ip_allow is None else list(record.ip_allow),
        scopes=list(record.permissions),
    )


def show_budget(budget: Budget, spent_nanos: int, now: datetime) -> BudgetShown:
    whole = Money.of(budget.nanos)
    return BudgetShown(
        credits=whole.credits,
        usd=whole.usd,
        window=budget.window,
        spent=Money.of(spent_nanos),
        # A budget may be made smaller than what was spent.
        remaining=Money.of(max(budget.nanos - spent_nanos, 0)),
        resets_at=window_end(budget.window, window_start(budget.window, now)),
    )


def with_secret(shown: KeyShown, secret: str) -> KeyWithSecret:
    return KeyWithSecret(**msgspec.structs.asdict(shown), key=secret)
