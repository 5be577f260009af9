"""Are the logins of an external book the ones that keep tenants apart?

Failure: ConfigError names everything that is wrong, at once; BookUnavailable.
"""

import logging

from config.errors import ConfigError
from config.names import variable
from config.settings import Book

log = logging.getLogger("gateway.walls")


async def refuse_roles(settings: Book, *, serves: bool = True) -> None:
    """As check_roles, for a process that starts now: roles that are shared are told in its log."""
    await check_roles(settings, serves=serves)
    if settings.roles == "shared":
        log.warning("book.roles_shared")


async def check_roles(settings: Book, *, serves: bool = True) -> None:
    """Raises ConfigError when no process must run with these logins. The schema is ours."""
    if problems := await _wrong_roles(settings, serves):
        raise ConfigError(tuple(problems))


async def _wrong_roles(settings: Book, serves: bool) -> list[str]:
    """What is wrong with the logins, each with the variable to change."""
    from billing.roles import (
        REQUEST,
        WORKER,
        look_at,
        request_url,
        worker_url,
        wrong_request,
        wrong_shared,
        wrong_worker,
    )

    worker = await look_at(worker_url(settings))
    request = await look_at(request_url(settings)) if serves else None
    if settings.roles == "shared":
        shared = wrong_shared(worker, WORKER)
        shared += wrong_shared(request, REQUEST) if request else []
        return _named("url", shared)
    wrong = _named("url", wrong_worker(worker))
    if request:
        wrong += _named("request_url", wrong_request(request, worker))
    return wrong


def _named(key: str, wrong: list[str]) -> list[str]:
    return [f"{variable(('book', key))}: {why}" for why in wrong]
