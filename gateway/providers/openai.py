"""Providers that speak OpenAI's protocol: OpenAI, OpenRouter, LiteLLM, vLLM and the rest."""

from config.settings import Provider
from gateway.providers.http import HttpClient
from gateway.providers.upstream import UpstreamReply, UpstreamRequest

PATHS = ("/chat/completions",)


class OpenAIUpstream:
    """One base URL and one key. What the client sent in headers does not go upstream."""

    def __init__(self, provider: Provider, client: HttpClient) -> None:
        """Raises ValueError for a base URL or a key that cannot be sent."""
        headers = {
            "accept": "application/json, text/event-stream",
            # Usage is found in the bytes of the answer, so they must not be compressed.
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "farebox",
        }
        self._client = client
        base_url = provider.base_url.rstrip("/")
        self._bare = {path: client.target(base_url + path, headers) for path in PATHS}
        if provider.key:
            headers["authorization"] = f"Bearer {provider.key.reveal()}"
        self._targets = {path: client.target(base_url + path, headers) for path in PATHS}

    async def send(self, request: UpstreamRequest) -> UpstreamReply:
        if request.own_key is None:
            target = self._targets[request.path]
        else:
            target = self._bare[request.path].authorized(request.own_key)
        return await self._client.post(target, request.body)

    async def close(self) -> None:
        """The client is shared and closed by its owner."""
