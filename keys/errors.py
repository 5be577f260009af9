"""Why a caller is not let in. The edge maps these to HTTP."""


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
