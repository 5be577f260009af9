"""What may be asked for a key, whoever asks: the checks that HTTP and the command line share. Pure.

Every check raises ValueError with a sentence for people.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import ip_network

NAME_MAX = 200
MODELS_MAX = 200
NETWORKS_MAX = 100
NETWORK_CHARS_MAX = 50
OVERLAP_S_MAX = 7 * 86_400
LIFE_MAX = timedelta(days=36_525)


def check_expiry(expires_at: datetime, now: datetime) -> None:
    """A key must end in the future, and while dates still fit everywhere."""
    if expires_at <= now:
        raise ValueError("The time at which the key expires is in the past.")
    if expires_at - now > LIFE_MAX:
        raise ValueError("A key may last for 100 years at most: leave its end out instead.")


def read_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """Addresses and networks in their one written form, without repetitions."""
    return tuple(dict.fromkeys(_network(text) for text in texts))


def _network(text: str) -> str:
    # With bits beyond its mask a network would silently become a wider one than it looks like.
    try:
        if len(text) > NETWORK_CHARS_MAX or "%" in text:
            raise ValueError(text)
        return str(ip_network(text))
    except ValueError as exc:
        raise ValueError("That is no IP address and no network such as 203.0.113.0/24.") from exc
