"""The edge's errors: every refusal and failure as the OpenAI envelope, mapped here once.

Clients show only `message`: it says what, how much, what to do next and whether it was charged.
"""

from collections.abc import Callable
from datetime import UTC
from typing import Any

import msgspec

from billing import errors as billing
from billing.book import BookRefused
from billing.money import credits_text, usd_text
from config.ids import id_text
from gateway.rate_headers import rate_headers
from keys import errors as keys

# A path inside this project: it has no public address of its own yet.
DOC_URL = "docs/errors.md#"
NOT_CHARGED = "You were not charged."
RETRY_SOON_S = 1
RETRY_AFTER_MAX_S = 60
# SDKs repeat a 409 by themselves unless they are told not to.
FINAL = ((b"x-should-retry", b"false"),)


class ApiError(Exception):
    """An answer other than success, as the client will see it.

    label names it in metrics and documentation: code, unless that is a provider's own word.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.label = code
        self.message = message
        self.kind = kind
        self.param = param
        self.headers = headers

    def envelope(self, request_id: str) -> dict[str, Any]:
        """`{"error": {...}}` with the fields that SDKs and people read."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "code": self.code,
                "param": self.param,
                "doc_url": DOC_URL + self.label,
                "request_id": request_id,
            }
        }

    def body(self, request_id: str) -> bytes:
        return msgspec.json.encode(self.envelope(request_id))


def invalid(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, code, f"{message} {NOT_CHARGED}", param=param)


def late_body() -> ApiError:
    """400, never 408: SDKs repeat that by themselves."""
    exc = invalid("The body did not arrive in time.")
    exc.headers = ((b"connection", b"close"),)
    return exc


def unavailable(
    what: str, code: str = "unavailable", retry_after_s: int = RETRY_SOON_S
) -> ApiError:
    """503: refused before anything was charged; the same request may work in a moment."""
    return ApiError(
        503,
        code,
        f"{what} Nothing was forwarded. {NOT_CHARGED} Try again.",
        kind="server_error",
        headers=((b"retry-after", b"%d" % retry_after_s),),
    )


def upstream_error(
    message: str, *, status: int = 502, code: str = "upstream_error", may_have_billed: bool = False
) -> ApiError:
    """The provider failed. Once it may have billed, SDKs are told not to repeat by themselves."""
    headers = ((b"x-should-retry", b"false"),) if may_have_billed else ()
    return ApiError(status, code, message, kind="upstream_error", headers=headers)


def _unauthorized(code: str, message: str) -> Callable[[Any], ApiError]:
    text = f"{message} {NOT_CHARGED}"
    headers = ((b"www-authenticate", b"Bearer"),)
    return lambda _: ApiError(401, code, text, kind="authentication_error", headers=headers)


def _insufficient(exc: billing.InsufficientCredit) -> ApiError:
    needed, available = exc.needed_nanos, exc.available_nanos
    message = (
        f"This request may cost up to {credits_text(needed)} credits (${usd_text(needed)}), but "
        f"only {credits_text(available)} credits (${usd_text(available)}) are available. "
        f"Add credits, or ask for fewer tokens (max_completion_tokens). {NOT_CHARGED}"
    )
    return ApiError(402, "insufficient_credits", message, kind="insufficient_quota")


def _key_limit(exc: billing.KeyLimitReached) -> ApiError:
    needed, limit, left = exc.needed_nanos, exc.limit_nanos, max(exc.available_nanos, 0)
    resets = "It never resets"
    if exc.resets_at is not None:
        resets = f"It resets at {exc.resets_at:%Y-%m-%dT%H:%M:%SZ}"
    message = (
        f"This request may cost up to {credits_text(needed)} credits (${usd_text(needed)}), but "
        f"of this key's budget of {credits_text(limit)} credits (${usd_text(limit)}) only "
        f"{credits_text(left)} credits (${usd_text(left)}) are left. {resets}. "
        f"Wait, raise the budget, or ask for fewer tokens (max_completion_tokens). {NOT_CHARGED}"
    )
    return ApiError(402, "key_limit_reached", message, kind="insufficient_quota")


def _too_many(exc: billing.TooManyOpenRequests) -> ApiError:
    message = (
        f"This {exc.scope} has {exc.limit} requests open, as many as it may have. "
        f"Wait for one to finish. {NOT_CHARGED}"
    )
    headers = ((b"retry-after", b"1"), (b"retry-after-ms", b"1000"))
    return ApiError(429, "rate_limited", message, kind="rate_limit_error", headers=headers)


def _over_rate(exc: billing.RateLimited) -> ApiError:
    wait_s = min(-(-exc.retry_after_ms // 1000), RETRY_AFTER_MAX_S)
    what = "requests" if exc.kind == "requests" else "tokens (those of the prompt and the answer)"
    message = (
        f"This {exc.scope} may have {exc.limit} {what} per minute, and this request would be more. "
        f"Try again in {wait_s} s. {NOT_CHARGED}"
    )
    headers = (
        (b"retry-after", b"%d" % wait_s),
        (b"retry-after-ms", b"%d" % exc.retry_after_ms),
        *rate_headers(exc.standings),
    )
    return ApiError(429, "rate_limited", message, kind="rate_limit_error", headers=headers)


def _too_many_grants(exc: keys.TooManyGrants) -> ApiError:
    message = (
        f"This account has {exc.limit} grants that are open or were minted within an hour, as many "
        "as it may have. Revoke some that are older, or wait."
    )
    return ApiError(409, "too_many_grants", message, headers=FINAL)


def _in_flight(_: Any) -> ApiError:
    message = (
        "The first request with this Idempotency-Key is still under way. "
        "This call was not charged. Try again in a moment."
    )
    headers = ((b"retry-after", b"%d" % RETRY_SOON_S),)
    return ApiError(409, "idempotency_in_flight", message, headers=headers)


def _completed(exc: billing.IdempotencyCompleted) -> ApiError:
    receipt_id = f"rcpt_{id_text(exc.request_id)}"
    charged = f"was charged once, ${usd_text(exc.price_nanos)}" if exc.price_nanos else "was free"
    message = (
        f"The first request with this Idempotency-Key has ended and {charged} (receipt "
        f"{receipt_id}); its answer is not stored. This call was not charged. Use a new key to "
        "ask again."
    )
    headers = ((b"x-should-retry", b"false"), (b"x-receipt-id", receipt_id.encode()))
    return ApiError(409, "idempotency_completed", message, headers=headers)


def _mismatch(_: Any) -> ApiError:
    message = "This Idempotency-Key was used before with another body. Use a new key."
    return ApiError(422, "idempotency_mismatch", f"{message} {NOT_CHARGED}")


def _forbidden(code: str, message: str) -> Callable[[Any], ApiError]:
    return lambda _: ApiError(403, code, f"{message} {NOT_CHARGED}", kind="permission_error")


def _key_revoked(_: Any) -> ApiError:
    message = "This key was revoked, for good. Make a new one."
    return ApiError(409, "key_revoked", message, headers=FINAL)


def _too_many_keys(exc: keys.TooManyKeys) -> ApiError:
    message = (
        f"This account has {exc.limit} API keys that are active or were made within a day, "
        "as many as it may have."
    )
    return ApiError(409, "too_many_keys", message, headers=FINAL)


def _rotation_in_progress(exc: keys.RotationInProgress) -> ApiError:
    ends_at = exc.ends_at.astimezone(UTC).isoformat(timespec="seconds")
    message = (
        "This key was rotated, and the secret before it still works or has just ended "
        f"({ends_at}). Rotate it after that, or repeat the first call with its Idempotency-Key."
    )
    return ApiError(409, "rotation_in_progress", message, headers=FINAL)


def _rotation_mismatch(_: Any) -> ApiError:
    message = "This Idempotency-Key was used for a rotation with another overlap_s. Use a new key."
    return ApiError(422, "idempotency_mismatch", message)


def _unavailable(what: str) -> Callable[[Any], ApiError]:
    return lambda _: unavailable(what)


def _conflict(message: str) -> Callable[[Any], ApiError]:
    return lambda _: ApiError(409, "conflict", message)


def _not_found(message: str) -> Callable[[Any], ApiError]:
    return lambda _: ApiError(404, "not_found", message)


def _login_refused(exc: keys.LoginRefused) -> ApiError:
    message = f"{exc.reason} You are not signed in."
    return ApiError(401, "login_refused", message, kind="authentication_error")


def _session_invalid(_: Any) -> ApiError:
    message = f"You are not signed in, or your session has ended. Sign in again. {NOT_CHARGED}"
    return ApiError(401, "session_invalid", message, kind="authentication_error")


def _wallet_taken(_: Any) -> ApiError:
    message = "This wallet belongs to another user."
    return ApiError(409, "wallet_taken", message, headers=FINAL)


# Every exception class of keys.errors and billing.errors stands here; a test holds us to it.
_ROWS: dict[type[Exception], Callable[[Any], ApiError]] = {
    keys.CredentialMissing: _unauthorized(
        "invalid_api_key", "No API key was sent. Send it as 'Authorization: Bearer fb_live_...'."
    ),
    keys.KeyMalformed: _unauthorized(
        "key_malformed", "This is no Farebox API key (fb_live_...): copy the whole key again."
    ),
    keys.KeyInvalid: _unauthorized(
        "invalid_api_key", "This API key is not known or was revoked. Use another key."
    ),
    keys.KeyExpired: _unauthorized("key_expired", "This API key has expired. Make a new one."),
    keys.KeysUnavailable: _unavailable("API keys cannot be looked up right now."),
    keys.KeyNotFound: _not_found("There is no such key."),
    keys.KeyRevoked: _key_revoked,
    keys.TooManyKeys: _too_many_keys,
    keys.RotationInProgress: _rotation_in_progress,
    keys.RotationMismatch: _rotation_mismatch,
    keys.TooManyGrants: _too_many_grants,
    keys.SealingKeyMissing: _unavailable(
        "Upstream credentials cannot be kept here: no key is set."
    ),
    keys.CredentialNotFound: _not_found("The key has no credential of its own for that provider."),
    keys.SealBroken: _unavailable("The upstream credential cannot be opened."),
    keys.LoginRefused: _login_refused,
    keys.VerifierUnavailable: _unavailable("Signatures cannot be verified right now."),
    keys.ChainUnavailable: _unavailable("The chain of this wallet does not answer right now."),
    keys.SessionsUnavailable: _unavailable("Sessions cannot be looked up right now."),
    keys.SessionInvalid: _session_invalid,
    keys.WalletTaken: _wallet_taken,
    keys.OriginMismatch: _forbidden(
        "origin_mismatch",
        "With a session this needs an Origin header that names this gateway.",
    ),
    billing.InsufficientCredit: _insufficient,
    billing.KeyLimitReached: _key_limit,
    billing.TooManyOpenRequests: _too_many,
    billing.RateLimited: _over_rate,
    billing.AccountFrozen: _forbidden("account_frozen", "This account is frozen."),
    billing.KeyRevoked: _unauthorized(
        "invalid_api_key", "This API key is not known or was revoked. Use another key."
    ),
    billing.TillUnavailable: _unavailable("Credit cannot be reserved right now."),
    billing.TillRebuilding: _unavailable("Credit reservations are being restored."),
    billing.TillRefused: _unavailable("Credit cannot be reserved right now."),
    billing.BookUnavailable: _unavailable("The account cannot be read right now."),
    BookRefused: _unavailable("The account cannot be read right now."),
    billing.IdempotencyMismatch: _mismatch,
    billing.IdempotencyInFlight: _in_flight,
    billing.IdempotencyCompleted: _completed,
    billing.ReceiptsPending: _unavailable("Too many receipts are waiting to be recorded."),
    billing.AccountUnknown: _not_found("There is no such account."),
    billing.CreditTooLarge: _conflict(str(billing.CreditTooLarge())),
    billing.ReferenceConflict: _conflict(str(billing.ReferenceConflict())),
    billing.PaymentNotFound: _not_found("There is no such payment attempt."),
    billing.HashTaken: lambda _: ApiError(
        409,
        "tx_hash_taken",
        "This transaction was submitted for another attempt. Whoever submitted it: what it pays is "
        "credited to the account that proved the wallet it came from.",
        headers=FINAL,
    ),
    billing.AttemptClosed: lambda _: ApiError(
        409,
        "attempt_closed",
        "This attempt has another transaction, or has ended. Make a new intent.",
        headers=FINAL,
    ),
    billing.IntentExpired: lambda _: ApiError(
        409,
        "intent_expired",
        "This intent has expired. Make a new one, and submit there what you have sent.",
        headers=FINAL,
    ),
    billing.TransferUnknown: _not_found("There is no such transfer."),
    billing.TransferNotInSuspense: _conflict(str(billing.TransferNotInSuspense())),
    billing.TransferChanged: _conflict(str(billing.TransferChanged())),
}


def to_api_error(exc: Exception) -> ApiError:
    """The answer for a refusal or failure. Raises exc again when it is a bug."""
    if isinstance(exc, ApiError):
        return exc
    row = _ROWS.get(type(exc))
    if row is None:
        raise exc
    return row(exc)


def mapped_errors() -> frozenset[type[Exception]]:
    """The exception classes that have an answer."""
    return frozenset(_ROWS)


def internal_error() -> ApiError:
    """500: a bug of ours. Whatever was held is settled or comes back by itself."""
    return ApiError(
        500,
        "internal_error",
        "Something went wrong in the gateway. Quote the request id when you report it.",
        kind="server_error",
        headers=((b"x-should-retry", b"false"),),
    )
