"""Signing in and out: /api/v1/auth/*. The session is a cookie; no answer has a secret in it."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, get, post
from litestar.datastructures import Cookie
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from msgspec import Meta

from config.ids import id_text
from gateway.api.body import Body
from gateway.api.login_limits import count_address, count_nonce, wallet_counter
from gateway.api.policy import Policy, caller_of
from gateway.api.tenant import tenant
from gateway.errors import ApiError
from gateway.origins import (
    check_origin,
    cookie_of,
    is_secure,
    login_cookie,
    own_origin,
    session_cookie,
)
from gateway.services import Services
from gateway.sign_in import Attempt
from gateway.single_headers import by_name
from gateway.suspense import credit_waiting
from keys.errors import LoginRefused, SessionInvalid
from keys.identity_store import list_wallets
from keys.session import NONCE_TTL_S, Session, is_session_id, sealed

AnyRequest = Request[Any, Any, Any]


class SignedMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sign-in message (EIP-4361) and its signature, `0x` and hexadecimal digits."""

    message: Annotated[str, Meta(min_length=1, max_length=8192)]
    signature: Annotated[str, Meta(min_length=1, max_length=20_000)]


class NonceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a sign-in message has to say."""

    nonce: str
    expires_in_s: int
    domain: str
    uri: str
    version: str
    chain_ids: tuple[int, ...]


class SessionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Who is signed in; times are Unix seconds."""

    user_id: str
    account_id: str
    wallet: str
    wallet_kind: Literal["eoa", "contract"]
    created_at: int
    expires_at: int
    wallets: list[str]


class WalletAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A wallet that was linked."""

    wallet: str
    wallet_kind: Literal["eoa", "contract"]


def handlers(services: Services) -> list[HTTPRouteHandler]:
    """The handlers."""
    return [*_ways_in(services), *_ways_out(services)]


def _ways_in(services: Services) -> list[HTTPRouteHandler]:
    settings, sign_in = services.settings, services.sign_in

    @post("/api/v1/auth/nonce", status_code=200, policy=Policy.PUBLIC)
    async def nonce(request: AnyRequest) -> Response[NonceAnswer]:
        """A nonce for one sign-in, for five minutes, for the browser that gets its cookie."""
        headers = _headers(request)
        origin = _own_origin(services, headers)
        if b"origin" in headers:
            check_origin(settings, headers)
        await count_address(services, request)
        await count_nonce(services)
        made, browser = await sign_in.new_nonce()
        answer = NonceAnswer(
            nonce=made,
            expires_in_s=NONCE_TTL_S,
            domain=origin.partition("://")[2],
            uri=origin,
            version="1",
            chain_ids=settings.identity.chain_ids,
        )
        cookie = _cookie(services, login_cookie(settings), browser, NONCE_TTL_S)
        return Response(answer, cookies=[cookie])

    @post(
        "/api/v1/auth/verify",
        status_code=200,
        policy=Policy.PUBLIC,
        dto=Body[SignedMessage],
        return_dto=None,
    )
    async def verify(request: AnyRequest, data: JSONBody[SignedMessage]) -> Response[SessionAnswer]:
        """Sign in with a signed message; any session that the browser had ends."""
        attempt = await _attempt(services, request, data)
        secret, session = await sign_in.sign_in(attempt, wallet_counter(services))
        await credit_waiting(services, session.wallet)
        await _end_session(services, _headers(request))
        lasts_s = session.expires_at - session.created_at
        cookies = [
            _cookie(services, session_cookie(settings), secret, lasts_s),
            _cookie(services, login_cookie(settings), "", 0),
        ]
        return Response(await _shown(services, session), cookies=cookies)

    @post(
        "/api/v1/auth/link",
        status_code=200,
        policy=Policy.SESSION,
        dto=Body[SignedMessage],
        return_dto=None,
    )
    async def link(request: AnyRequest, data: JSONBody[SignedMessage]) -> Response[WalletAnswer]:
        """Link one more wallet to who is signed in. A wallet belongs to one user."""
        attempt = await _attempt(services, request, data)
        wallet = await sign_in.link(_session(request), attempt, wallet_counter(services))
        await credit_waiting(services, wallet.address)
        answer = WalletAnswer(wallet=wallet.address, wallet_kind=wallet.kind)
        return Response(answer, cookies=[_cookie(services, login_cookie(settings), "", 0)])

    return [nonce, verify, link]


def _ways_out(services: Services) -> list[HTTPRouteHandler]:
    settings, sign_in = services.settings, services.sign_in

    @get("/api/v1/auth/session", policy=Policy.SESSION)
    async def session(request: AnyRequest) -> Response[SessionAnswer]:
        """Who is signed in."""
        return Response(await _shown(services, _session(request)))

    @post("/api/v1/auth/logout", status_code=204, policy=Policy.PUBLIC)
    async def logout(request: AnyRequest) -> Response[None]:
        """End this session, everywhere within five seconds. Again changes nothing."""
        headers = _headers(request)
        if b"cookie" in headers:
            check_origin(settings, headers)
        await _end_session(services, headers)
        cookie = _cookie(services, session_cookie(settings), "", 0)
        return Response(None, cookies=[cookie])

    @post("/api/v1/auth/logout-all", status_code=204, policy=Policy.SESSION, when_frozen=True)
    async def logout_all(request: AnyRequest) -> Response[None]:
        """End all sessions of who is signed in, everywhere within five seconds."""
        _forget(services, await sign_in.sessions.end_all(_session(request).user_id))
        cookie = _cookie(services, session_cookie(settings), "", 0)
        return Response(None, cookies=[cookie])

    return [session, logout, logout_all]


def _headers(request: AnyRequest) -> dict[bytes, bytes]:
    return by_name(list(request.scope["headers"]))


def _own_origin(services: Services, headers: dict[bytes, bytes]) -> str:
    origin = own_origin(services.settings, headers)
    if origin is None:
        message = "Nobody can sign in at this address: identity.public_origin is not set to it."
        raise ApiError(403, "sign_in_not_here", message, kind="permission_error")
    return origin


async def _attempt(services: Services, request: AnyRequest, data: SignedMessage) -> Attempt:
    """What is known of an attempt to sign in before anything is looked up."""
    headers = _headers(request)
    origin = _own_origin(services, headers)
    check_origin(services.settings, headers)
    browser = cookie_of(headers, login_cookie(services.settings))
    if browser is None or not is_session_id(browser):
        raise LoginRefused("The cookie that came with the nonce was not sent.")
    await count_address(services, request)
    return Attempt(message=data.message, signature=data.signature, browser=browser, origin=origin)


def _session(request: AnyRequest) -> Session:
    session = caller_of(request).session
    if session is None:
        raise SessionInvalid
    return session


async def _end_session(services: Services, headers: dict[bytes, bytes]) -> None:
    """End the session whose cookie a request has, if it has one."""
    secret = cookie_of(headers, session_cookie(services.settings))
    if secret is not None and is_session_id(secret):
        digest = sealed(secret)
        _forget(services, [digest])
        await services.sign_in.sessions.end(digest)


def _forget(services: Services, digests: list[str]) -> None:
    callers = services.authenticator.sessions
    if callers is not None:
        callers.forget(digests)


async def _shown(services: Services, session: Session) -> SessionAnswer:
    async with tenant(services, session.account_id) as conn:
        wallets = await list_wallets(conn, session.user_id)
    return SessionAnswer(
        user_id=f"user_{id_text(session.user_id)}",
        account_id=f"acct_{id_text(session.account_id)}",
        wallet=session.wallet,
        wallet_kind=session.kind,
        created_at=session.created_at,
        expires_at=session.expires_at,
        wallets=[wallet.address for wallet in wallets],
    )


def _cookie(services: Services, name: str, value: str, max_age_s: int) -> Cookie:
    """A cookie that no script reads and no other site sends; no age takes it away."""
    return Cookie(
        key=name,
        value=value,
        path="/",
        max_age=max_age_s,
        httponly=True,
        secure=is_secure(services.settings),
        samesite="strict",
    )
