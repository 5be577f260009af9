"""The models on offer and where each is served. Immutable; a reload makes a new one."""

import difflib
from collections.abc import Mapping

from billing.money import rate_of_usd
from billing.prices import Rates
from config.settings import Model, Price, Provider, Settings
from gateway.providers.echo import EchoUpstream
from gateway.providers.http import HttpClient
from gateway.providers.openai import OpenAIUpstream
from gateway.providers.upstream import Upstream
from gateway.relay.call import ModelRoute


class Catalog:
    """Public model ids to routes."""

    def __init__(self, routes: Mapping[str, ModelRoute]) -> None:
        self._routes = dict(routes)

    def find(self, model: str) -> ModelRoute | None:
        return self._routes.get(model)

    def nearest(self, model: str) -> list[str]:
        """Up to three names that look like this one."""
        return difflib.get_close_matches(model, self._routes, n=3, cutoff=0.5)

    def all(self) -> list[ModelRoute]:
        return list(self._routes.values())


def build_catalog(settings: Settings, client: HttpClient) -> Catalog:
    """The catalog of a config."""
    upstreams = {name: _upstream(p, client) for name, p in settings.providers.items()}
    return Catalog(
        {name: _route(settings, name, model, upstreams) for name, model in settings.models.items()}
    )


def config_rates(settings: Settings) -> dict[str, Rates]:
    """The prices of a config, as the price book keeps them."""
    return {
        name: rates_of(model.price)
        for name, model in settings.models.items()
        if model.price is not None
    }


def rates_of(price: Price) -> Rates:
    """Rates in nanos; a kind without a price of its own costs what its total's kind costs."""
    input_rate = rate_of_usd(price.input_usd_per_mtok)
    output_rate = rate_of_usd(price.output_usd_per_mtok)

    def rate(usd: str | None, instead: int) -> int:
        return instead if usd is None else rate_of_usd(usd)

    audio_in, audio_out = price.audio_input_usd_per_mtok, price.audio_output_usd_per_mtok
    return Rates(
        input_rate=input_rate,
        output_rate=output_rate,
        cached_input_rate=rate(price.cached_input_usd_per_mtok, input_rate),
        cache_write_rate=rate(price.cache_write_usd_per_mtok, input_rate),
        reasoning_rate=rate(price.reasoning_usd_per_mtok, output_rate),
        audio_input_rate=None if audio_in is None else rate_of_usd(audio_in),
        audio_output_rate=None if audio_out is None else rate_of_usd(audio_out),
    )


def _upstream(provider: Provider, client: HttpClient) -> Upstream:
    if provider.kind == "echo":
        return EchoUpstream(provider)
    return OpenAIUpstream(provider, client)


def _route(
    settings: Settings, name: str, model: Model, upstreams: Mapping[str, Upstream]
) -> ModelRoute:
    first = model.routes[0]
    provider = settings.providers[first.provider]
    return ModelRoute(
        model=name,
        provider=first.provider,
        upstream=upstreams[first.provider],
        upstream_model=first.model or name,
        reported_cost=provider.reported_cost,
        markup_bps=model.markup_bps or settings.billing.markup_bps,
        output_tokens_max=model.output_tokens_max,
        context_tokens=model.context_tokens,
        image_tokens_max=model.image_tokens_max,
        first_byte_timeout_s=(
            provider.first_byte_timeout_s or settings.timeouts.upstream_first_byte_s
        ),
        owned_by=model.owned_by,
    )
