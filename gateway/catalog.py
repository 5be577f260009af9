"""The models on offer and where each is served. Immutable; a reload makes a new one."""

import difflib
from collections.abc import Mapping

from config.settings import Model, Provider, Settings
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
        stream_window_tokens=(
            settings.limits.stream_window_tokens
            if model.stream_window_tokens is None
            else model.stream_window_tokens
        ),
        first_byte_timeout_s=(
            provider.first_byte_timeout_s or settings.timeouts.upstream_first_byte_s
        ),
        owned_by=model.owned_by,
    )
