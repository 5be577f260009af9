"""One request from admission to receipt, and what the stages share about it."""

import time
import warnings
from datetime import UTC, datetime
from uuid import UUID

import msgspec

from billing.prices import PriceVersion, Rates
from billing.receipts import ChargeReceipt, Outcome, Provenance
from billing.till import SpendScopes
from config.ids import id_text, new_id
from gateway.protocols.facts import CallFacts
from gateway.providers.upstream import Upstream
from keys.principal import Principal


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """A principal and the scopes it spends from."""

    principal: Principal
    scopes: SpendScopes
    account_text: str
    key_text: str


class ModelRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A public model as it is served: where to, at what markup, with which bounds."""

    model: str
    provider: str
    upstream: Upstream
    upstream_model: str
    reported_cost: bool
    markup_bps: int
    output_tokens_max: int
    context_tokens: int
    image_tokens_max: int
    first_byte_timeout_s: float
    owned_by: str


class Arrival(msgspec.Struct, kw_only=True):
    """What is known of a request before it is admitted."""

    request_uid: UUID
    request_id: str
    started_at: float
    started_mono: float
    client_request_id: str = ""
    client_retry_count: int = 0

    @classmethod
    def now(cls) -> "Arrival":
        uid = new_id()
        return cls(
            request_uid=uid,
            request_id=id_text(uid),
            started_at=time.time(),
            started_mono=time.monotonic(),
        )


class Call:
    """An admitted request: it owns a hold until `end` handed its receipt over.

    A Call that is dropped while its hold is open warns: tests turn that into a failure.
    """

    __slots__ = (
        "arrival",
        "caller",
        "facts",
        "first_byte_at",
        "hold_nanos",
        "input_ceiling",
        "is_open",
        "output_max",
        "price",
        "route",
        "upstream_request_id",
        "upstream_wait_s",
    )

    def __init__(
        self,
        arrival: Arrival,
        caller: Caller,
        facts: CallFacts,
        route: ModelRoute,
        price: PriceVersion | None,
    ) -> None:
        self.arrival = arrival
        self.caller = caller
        self.facts = facts
        self.route = route
        self.price = price
        self.hold_nanos = 0
        self.input_ceiling = 0
        self.output_max = 0
        self.is_open = False
        self.first_byte_at: float | None = None
        self.upstream_request_id = ""
        self.upstream_wait_s = 0.0

    @property
    def request_id(self) -> str:
        """26 characters; with `req_` or `rcpt_` before it, the ids that the client sees."""
        return self.arrival.request_id

    @property
    def rates(self) -> Rates | None:
        return None if self.price is None else self.price.rates

    def new_receipt(self, outcome: Outcome) -> ChargeReceipt:
        """The receipt of this call as it stands now, with nothing charged yet."""
        principal = self.caller.principal
        first = self.first_byte_at
        return ChargeReceipt(
            request_id=self.arrival.request_uid,
            source_reference=self.request_id,
            billing_account_id=principal.account_id,
            virtual_key_id=principal.virtual_key_id,
            app_key_id=principal.app_key_id,
            protocol="chat.completions",
            provider=self.route.provider,
            requested_model=self.facts.model,
            markup_bps=self.route.markup_bps,
            price_version=None if self.price is None else self.price.price_version,
            hold_nanos=self.hold_nanos,
            outcome=outcome,
            provenance=Provenance.STREAM if self.facts.stream else Provenance.RESPONSE,
            client_request_id=self.arrival.client_request_id,
            client_retry_count=self.arrival.client_retry_count,
            started_at=datetime.fromtimestamp(self.arrival.started_at, UTC),
            first_byte_at=None if first is None else datetime.fromtimestamp(first, UTC),
            finished_at=datetime.now(UTC),
        )

    def __del__(self) -> None:
        if self.is_open:
            warnings.warn(f"hold {self.request_id} was never ended", ResourceWarning, stacklevel=1)
