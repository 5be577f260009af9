"""Who a request acts for, resolved on the server from the credential alone. Pure."""

from datetime import datetime
from uuid import UUID

import msgspec


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The account, virtual key and app key behind a credential, with their own limits."""

    account_id: UUID
    virtual_key_id: UUID
    app_key_id: UUID
    digest: bytes
    expires_at: datetime | None
    account_active: bool
    account_open_max: int | None
    key_open_max: int | None

    def __repr__(self) -> str:
        return f"Principal(account={self.account_id}, key={self.app_key_id})"
