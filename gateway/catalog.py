"""The models on offer and where each is served. Immutable; a reload makes a new one."""

import difflib
from collections.abc import Mapping

from config import settings as config
from config.settings import Model, Provider, Settings
from gateway.providers.echo import EchoUpstream
from gateway.providers.http import HttpClient
from gateway.providers.openai import OpenAIUpstream
from gateway.providers.upstream import Upstream
from gateway.relay.call import PublicModel, Route


class Catalog:
    """Public model ids to models with their routes."""

    def __init__(self, models: Mapping[str, PublicModel]) -> None:
        self._models = dict(models)

    def find(self, model: str) -> PublicModel | None:
        return self._models.get(model)

    def nearest(self, model: str) -> list[str]:
        """Up to three names that look like this one."""
        return difflib.get_close_matches(model, self._models, n=3, cutoff=0.5)

    def all(self) -> list[PublicModel]:
        return list(self._models.values())


def build_catalog(settings: Settings, client: HttpClient) -> Catalog:
    """The catalog of a config."""
    upstreams = {name: _upstream(p, client) for name, p in settings.providers.items()}
    return Catalog(
        {name: _model(settings, name, model, upstreams) for name, model in settings.models.items()}
    )


def _upstream(provider: Provider, client: HttpClient) -> Upstream:
    if provider.kind == "echo":
        return EchoUpstream(provider)
    return OpenAIUpstream(provider, client)


def _model(
    settings: Settings, name: str, model: Model, upstreams: Mapping[str, Upstream]
) -> PublicModel:
    return PublicModel(
        name=name,
        routes=tuple(_route(settings, name, route, upstreams) for route in model.routes),
        markup_bps=model.markup_bps or settings.billing.markup_bps,
        output_tokens_max=model.output_tokens_max,
        context_tokens=model.context_tokens,
        image_tokens_max=model.image_tokens_max,
        stream_window_tokens=(
            settings.limits.stream_window_tokens
            if model.stream_window_tokens is None
            else model.stream_window_tokens
        ),
        owned_by=model.owned_by,
    )


def _route(
    settings: Settings, name: str, route: config.Route, upstreams: Mapping[str, Upstream]
) -> Route:
    provider = settings.providers[route.provider]
    return Route(
        provider=route.provider,
        upstream=upstreams[route.provider],
        upstream_model=route.model or name,
        reported_cost=provider.reported_cost,
        first_byte_timeout_s=(
            provider.first_byte_timeout_s or settings.timeouts.upstream_first_byte_s
        ),
    )
