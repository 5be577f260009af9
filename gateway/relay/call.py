"""One request from admission to receipt, and what the stages share about it."""

import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from uuid import UUID

import msgspec
from msgspec.structs import replace

from billing.budget_windows import BudgetedScopes
from billing.prices import PriceVersion, Rates
from billing.receipts import ChargeReceipt, FailedAttempt, Outcome, Provenance
from billing.standing import Standings
from billing.till_scopes import SpendScopes
from config.ids import id_text, new_id
from config.secret import Secret
from gateway.protocols.facts import CallFacts
from gateway.providers.upstream import Upstream
from gateway.relay.bars import Bars
from keys.principal import Principal
from keys.session import Session


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """A principal and the scopes it spends from."""

    principal: Principal
    scopes: SpendScopes
    """Without a budget."""
    account_text: str
    key_text: str
    budgeted: BudgetedScopes | None = None
    """With one, if it has one."""
    bars: Bars | None = None
    """None: it may do everything, from anywhere, with the models of its principal."""
    upstream_keys: Mapping[str, Secret] | None = None
    """Its own credentials, by provider, instead of the providers' keys."""
    session: Session | None = None
    """Of somebody who signed in; keys have none."""

    def scopes_at(self, moment: float) -> SpendScopes:
        """What a request spends from that came at that moment."""
        if self.budgeted is None:
            return self.scopes
        return self.budgeted.at(_datetime(moment))


def _datetime(moment: float) -> datetime:
    """As it stands on receipts: the window of a budget is found from there again."""
    return datetime.fromtimestamp(moment, UTC)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve a model: which provider, under what name there."""

    provider: str
    upstream: Upstream
    upstream_model: str
    reported_cost: bool
    first_byte_timeout_s: float


class PublicModel(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A model as users know it: at what markup, with which bounds, served by which routes.

    Its hold and its price are the same whichever of the routes answers.
    """

    name: str
    routes: tuple[Route, ...]
    markup_bps: int
    output_tokens_max: int
    context_tokens: int
    image_tokens_max: int
    stream_window_tokens: int
    owned_by: str

    @cached_property
    def blank_receipt(self) -> ChargeReceipt:
        """What all receipts of this model's first route have in common; the rest is nobody's."""
        nil, never = UUID(int=0), datetime.fromtimestamp(0, UTC)
        return ChargeReceipt(
            request_id=nil,
            source_reference="",
            billing_account_id=nil,
            virtual_key_id=nil,
            app_key_id=None,
            protocol="chat.completions",
            provider=self.routes[0].provider,
            requested_model=self.name,
            markup_bps=self.markup_bps,
            hold_nanos=0,
            provenance=Provenance.RESPONSE,
            started_at=never,
            finished_at=never,
        )


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
        "hold_max_nanos",
        "hold_nanos",
        "input_ceiling",
        "is_counted",
        "is_open",
        "is_sent",
        "is_taken",
        "lowered_to",
        "model",
        "output_max",
        "output_tokens",
        "price",
        "receipt",
        "route",
        "scopes",
        "standings",
        "upstream_request_id",
        "upstream_wait_s",
        "wanted_nanos",
    )

    def __init__(
        self,
        arrival: Arrival,
        caller: Caller,
        facts: CallFacts,
        model: PublicModel,
        price: PriceVersion | None,
    ) -> None:
        self.arrival = arrival
        self.caller = caller
        self.scopes = caller.scopes_at(arrival.started_at)
        """What it spends from, to its end, whatever window of a budget begins meanwhile."""
        self.facts = facts
        self.model = model
        self.route = model.routes[0]
        """The one in use; another takes its place when it failed and nothing was billed."""
        self.price = price
        self.hold_nanos = 0
        self.hold_max_nanos = 0
        """What a call that cannot be stopped in the middle holds: growth ends here."""
        self.wanted_nanos = 0
        """What the next renewal asks for, when it is more than what is held."""
        self.input_ceiling = 0
        self.is_counted = False
        """Whether the ceiling rests on a count of the tokens instead of the bytes."""
        self.output_tokens = facts.output_tokens or model.output_tokens_max
        """What one choice may have: as asked for, or lowered to what can be paid."""
        self.lowered_to: int | None = None
        """The same, when it was lowered."""
        self.output_max = 0
        self.is_open = False
        self.standings: Standings | None = None
        """How its limits per minute stood when it was admitted, if there are any."""
        self.is_sent = False
        """Whether the provider may have got something of it: before, nobody pays for anything."""
        self.is_taken = False
        """Whether a sweeper ended it: it must stop, and the difference is posted with its end."""
        self.receipt: ChargeReceipt | None = None
        self.first_byte_at: float | None = None
        self.upstream_request_id = ""
        self.upstream_wait_s = 0.0

    @property
    def request_id(self) -> str:
        """26 characters; with `req_` or `rcpt_` before it, the ids that the client sees."""
        return self.arrival.request_id

    @property
    def is_first_attempt(self) -> bool:
        """Whether no provider was tried yet, so that nothing marks the hold as forwarded."""
        return self.receipt is None or self.receipt.attempt == 1

    @property
    def rates(self) -> Rates | None:
        return None if self.price is None else self.price.rates

    @property
    def output_asked(self) -> int:
        """The output tokens of one choice that the client asked for."""
        return self.facts.output_tokens or self.model.output_tokens_max

    def take_over(self, held_nanos: int) -> None:
        """The till holds that much for this call. It is never told to hold less."""
        self.hold_nanos = max(self.hold_nanos, held_nanos)

    def open_receipt(self, outcome: Outcome) -> ChargeReceipt:
        """The receipt of this call at its beginning, with nothing charged yet."""
        arrival, principal, price = self.arrival, self.caller.principal, self.price
        started_at, budget = _datetime(arrival.started_at), self.scopes.budget
        self.receipt = replace(
            self.model.blank_receipt,
            request_id=arrival.request_uid,
            source_reference=arrival.request_id,
            billing_account_id=principal.account_id,
            virtual_key_id=principal.virtual_key_id,
            app_key_id=principal.app_key_id,
            price_version=None if price is None else price.price_version,
            hold_nanos=self.hold_nanos,
            outcome=outcome,
            provenance=Provenance.STREAM if self.facts.stream else Provenance.RESPONSE,
            client_request_id=arrival.client_request_id,
            client_retry_count=arrival.client_retry_count,
            started_at=started_at,
            finished_at=started_at,
            budget_window=budget.window if budget is not None else "",
        )
        if principal.run_id or principal.graph_id:
            # Of the credential alone: nothing that a client sends gets here.
            self.receipt.run_id, self.receipt.graph_id = principal.run_id, principal.graph_id
        return self.receipt

    def next_route(self, failed: FailedAttempt) -> None:
        """Go on with the next route; the receipt keeps what the one before it did."""
        receipt = self.receipt
        assert receipt is not None
        self.route = self.model.routes[receipt.attempt]
        receipt.attempt += 1
        receipt.provider = self.route.provider
        receipt.failed_attempts = (*receipt.failed_attempts, failed)
        self.upstream_request_id = ""
        self.is_sent = False

    def end_receipt(self, outcome: Outcome) -> ChargeReceipt:
        """The same receipt, as the call stands now: whoever got it at the beginning took a copy."""
        receipt = self.receipt or self.open_receipt(outcome)
        receipt.outcome = outcome
        receipt.hold_nanos = self.hold_nanos
        if self.first_byte_at is not None:
            receipt.first_byte_at = datetime.fromtimestamp(self.first_byte_at, UTC)
        receipt.finished_at = datetime.now(UTC)
        return receipt

    def __del__(self) -> None:
        if self.is_open:
            warnings.warn(f"hold {self.request_id} was never ended", ResourceWarning, stacklevel=1)
