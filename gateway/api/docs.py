"""GET /openapi.json, and /docs: a page to read and try it, whose parts come from this process.

Nothing is loaded from elsewhere, and the page may not reach anything but us.
"""

import asyncio
from collections.abc import Callable
from functools import cache
from importlib import resources

from litestar import MediaType, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.policy import Policy
from gateway.errors import ApiError
from gateway.services import Services

CACHE = "public, max-age=86400"
# The page's own styles are inline, written by its script.
SAFETY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Farebox API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png">
</head>
<body>
<div id="api"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
# A credential that is typed into the page is gone with it.
START = """SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#api", deepLinking: true, persistAuthorization: false,
  validatorUrl: null,
});
"""


def handlers(services: Services, document: Callable[[], bytes]) -> list[HTTPRouteHandler]:
    """The routes of the documentation. document: makes the OpenAPI document; called once."""
    made: list[bytes] = []
    making = asyncio.Lock()

    @get("/openapi.json", policy=Policy.PUBLIC, include_in_schema=False)
    async def openapi() -> Response[bytes]:
        """The OpenAPI document of all routes."""
        async with making:
            # It takes a thread that long bodies of calls wait for.
            if not made:
                made.append(await services.aside.run(document))
        headers = {"access-control-allow-origin": "*"}
        return Response(made[0], media_type=MediaType.JSON, headers=headers)

    @get("/docs", policy=Policy.PUBLIC, include_in_schema=False, sync_to_thread=False)
    def page() -> Response[str]:
        """A page to read the API and to try it."""
        return Response(PAGE, media_type=MediaType.HTML, headers=SAFETY)

    @get("/docs/{name:str}", policy=Policy.PUBLIC, include_in_schema=False, sync_to_thread=True)
    def asset(name: FromPath[str]) -> Response[bytes]:
        """A part of that page."""
        if name == "start.js":
            return Response(START.encode(), media_type="text/javascript", headers=SAFETY)
        kind = ASSETS.get(name)
        if kind is None:
            raise ApiError(404, "unknown_url", "There is no such file.")
        return Response(_bundled(name), media_type=kind, headers={**SAFETY, "cache-control": CACHE})

    return [openapi, page, asset]


@cache
def _bundled(name: str) -> bytes:
    """A file of Swagger UI, as its package brings it. One copy for all who read it slowly."""
    (folder,) = resources.files("swagger_ui_bundle").joinpath("vendor").iterdir()
    return folder.joinpath(name).read_bytes()
