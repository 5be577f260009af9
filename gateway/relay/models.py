"""GET /v1/models and /v1/models/{id}: from memory, with prices."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import msgspec

from billing.errors import BillingError
from gateway.errors import ApiError, to_api_error
from gateway.http1.exchange import Exchange
from gateway.protocols.chat import MODEL_LENGTH_MAX, unknown_model
from gateway.relay.bars import caller_address, check_address
from gateway.relay.call import Arrival, Caller, PublicModel
from gateway.relay.http_in import JSON, own_headers, send_answer, send_error
from gateway.services import Services
from gateway.single_headers import by_name
from keys.errors import KeysError

CREATED = 1_700_000_000
ROUTE = "/v1/models"
# One nano over a million tokens and ten thousand basis points: prices per token stay exact.
DIGITS = 9 + 6 + 4


async def list_models(services: Services, arrival: Arrival, exchange: Exchange) -> None:
    def answer(caller: Caller) -> object:
        models = _allowed(services.catalog.all(), caller)
        return {"object": "list", "data": [_model(services, model) for model in models]}

    await _answer(services, arrival, exchange, answer)


async def one_model(services: Services, arrival: Arrival, exchange: Exchange, model: str) -> None:
    def answer(caller: Caller) -> object:
        found = services.catalog.find(model)
        name = model[:MODEL_LENGTH_MAX]
        if found is None:
            near = filter(None, map(services.catalog.find, services.catalog.nearest(name)))
            raise unknown_model(name, [one.name for one in _allowed(near, caller)])
        if not _allowed([found], caller):
            raise unknown_model(name, [])
        return _model(services, found)

    await _answer(services, arrival, exchange, answer)


async def _answer(
    services: Services, arrival: Arrival, exchange: Exchange, make: Callable[[Caller], object]
) -> None:
    try:
        headers = by_name(exchange.headers)
        caller = await services.authenticator.authenticate(headers, exchange.method)
        if caller.bars is not None:
            check_address(
                caller.bars, caller_address(exchange.peer, exchange.headers, services.settings)
            )
        answer = make(caller)
    except (ApiError, KeysError, BillingError) as exc:
        error = to_api_error(exc)
        services.metrics.count_request(ROUTE, error.status, error.code)
        send_error(exchange, error, arrival)
        return
    services.metrics.count_request(ROUTE, 200, "")
    send_answer(exchange, 200, [JSON, *own_headers(arrival)], msgspec.json.encode(answer))


def _allowed(models: Iterable[PublicModel], caller: Caller) -> list[PublicModel]:
    """Those that the caller may use."""
    allowed = caller.principal.models
    return [model for model in models if allowed is None or model.name in allowed]


def _model(services: Services, model: PublicModel) -> dict[str, object]:
    version = services.prices.at(model.name, datetime.now(UTC))
    shown: dict[str, object] = {
        "id": model.name,
        "object": "model",
        "created": CREATED,
        "owned_by": model.owned_by,
        "context_length": model.context_tokens,
        "max_output_tokens": model.output_tokens_max,
    }
    if version is not None:
        rates = version.rates
        shown["pricing"] = {
            "prompt": _per_token(rates.input_rate, model.markup_bps),
            "completion": _per_token(rates.output_rate, model.markup_bps),
            "input_cache_read": _per_token(rates.cached_input_rate, model.markup_bps),
            "input_cache_write": _per_token(rates.cache_write_rate, model.markup_bps),
            "internal_reasoning": _per_token(rates.reasoning_rate, model.markup_bps),
        }
    return shown


def _per_token(rate: int, markup_bps: int) -> str:
    """The user's price of one token in USD, exactly: '0.0000003'."""
    digits = f"{rate * markup_bps:0{DIGITS + 1}d}"
    return f"{digits[:-DIGITS]}.{digits[-DIGITS:]}".rstrip("0").rstrip(".")
