"""Credentials of callers for providers, opened once when a caller is looked up.

What cannot be opened is told and left out: the caller is then refused, never sent on with the
provider's own key.
"""

import logging
from collections.abc import Mapping

from config.ids import id_text
from config.secret import Secret
from config.settings import Keys
from keys.errors import SealBroken
from keys.principal import Principal

log = logging.getLogger("keys.upstream")


def open_keys(principal: Principal, keys: Keys) -> Mapping[str, Secret] | None:
    """Those that could be opened, by provider; None for a principal that has none."""
    if not principal.upstream_keys:
        return None
    # Most workers never see one: what opens them is not loaded for nothing.
    from keys.sealed import sealer_of

    opened = {}
    for provider, sealed in principal.upstream_keys:
        try:
            sealer = sealer_of(keys)
            opened[provider] = sealer.open(sealed, principal.virtual_key_id, provider)
        except (SealBroken, ValueError) as exc:
            facts = {
                "virtual_key_id": f"vkey_{id_text(principal.virtual_key_id)}",
                "provider": provider,
                "reason": str(exc),
            }
            log.error("key.credential_unreadable", extra=facts)
    return opened
