"""Why a caller is not let in. The edge maps these to HTTP."""

from datetime import datetime


class KeysError(Exception):
    """Something is wrong with a credential."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class CredentialMissing(KeysError):
    """No API key was sent."""


class KeyMalformed(KeysError):
    """That is not a Farebox API key."""


class KeyInvalid(KeysError):
    """The API key is not known or was revoked."""


class KeyExpired(KeysError):
    """The API key has expired."""


class KeysUnavailable(KeysError):
    """The keys cannot be looked up now."""


class KeyNotFound(KeysError):
    """No such key."""


class KeyRevoked(KeysError):
    """That key was revoked, for good. Make a new one."""


class TooManyKeys(KeysError):
    """The account has as many keys as it may have."""

    def __init__(self, *, limit: int) -> None:
        super().__init__()
        self.limit = limit


class RotationInProgress(KeysError):
    """The key is being rotated: its old secret still works."""

    def __init__(self, *, ends_at: datetime) -> None:
        super().__init__()
        self.ends_at = ends_at

    def __str__(self) -> str:
        return f"{self.__doc__} Until {self.ends_at.isoformat(timespec='seconds')}."


class RotationMismatch(KeysError):
    """The Idempotency-Key was used for a rotation with another overlap."""


class TooManyGrants(KeysError):
    """The account has as many open grants as it may have."""

    def __init__(self, *, limit: int) -> None:
        super().__init__()
        self.limit = limit


class SealingKeyMissing(KeysError):
    """There is no key to seal an upstream credential with."""


class SealBroken(KeysError):
    """An upstream credential cannot be opened."""


class CredentialNotFound(KeysError):
    """The key has no upstream credential for that provider."""


class LoginRefused(KeysError):
    """This sign-in is refused."""

    def __init__(self, reason: str) -> None:
        """reason: one sentence that may be shown; it repeats nothing of what was sent."""
        Exception.__init__(self, reason)
        self.reason = reason


class VerifierUnavailable(KeysError):
    """Signatures cannot be verified now."""


class ChainUnavailable(KeysError):
    """The chain did not answer in time."""


class SessionsUnavailable(KeysError):
    """Sessions cannot be looked up now."""


class SessionInvalid(KeysError):
    """There is no such session, or it has ended."""


class WalletTaken(KeysError):
    """This wallet belongs to somebody else."""


class OriginMismatch(KeysError):
    """A session may change something only from this gateway's own pages."""
