"""One run: a fresh account, clients, a fault, rest, and the evidence of all sides."""

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from billing.audit import audit
from billing.audit_report import Report
from billing.till_entries import Owner
from billing.till_scan import TillScan, open_till
from billing.till_scopes import BudgetScope, account_scope_key, shard_prefix
from billing.windows import BEGINNING
from config.ids import id_text
from gateway.supervisor import READY
from tests.faults.clients import Answer, send, send_all, served
from tests.faults.plan import CREDITS_RICH, Kind, Plan
from tests.faults.strike import Struck, keep_work, keep_worker, strike
from tests.faults.verdict import Evidence
from tests.faults.world import World
from tests.support.gateway import eventually

STARTS_S, SERVES_AGAIN_S = 30, 10
REST_S = 20
STRIKE_S = 60


async def run(world: World, plan: Plan) -> Evidence:
    """Do a run and gather what is known at its end."""
    trouble: list[str] = []
    struck = Struck()
    await world.begin_run(plan.orders[0].prompt)
    account_id, key = await world.account(plan.credits, has_budget=plan.number % 2 == 1)
    async with _recovery(world, plan):
        world.start_worker(plan.crash_at_first)
        if plan.has_second:
            await world.start_second().said(READY)
        await world.serves(STARTS_S)
        async with _kept(keep_worker(world, plan, struck)):
            async with asyncio.timeout(STRIKE_S), asyncio.TaskGroup() as group:
                clients = group.create_task(send_all(world, key, plan.orders))
                group.create_task(strike(world, plan, struck))
            answers = clients.result()
            answers += await _serves_again(world, plan, key, trouble)
            answers += await send_all(world, key, plan.repeats)
        await _stop_worker(world, plan, struck, trouble)
        await _stop_second(world, trouble)
        async with _kept(keep_work(world, plan, struck)):
            await _rest(world, account_id, trouble)
        return await _evidence(world, plan, struck, answers, account_id, trouble)


@asynccontextmanager
async def _kept(keeping: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something goes on beside; if it fails, so do we."""
    task = asyncio.ensure_future(keeping)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _stop_worker(world: World, plan: Plan, struck: Struck, trouble: list[str]) -> None:
    """It drains; one may still meet its crash point then."""
    assert world.worker is not None
    await world.serves(STARTS_S)
    status = await world.worker.stop()
    if status == -signal.SIGKILL and plan.point is not None and not struck.died_at(plan.point):
        struck.kills.append(plan.point.name)
        struck.stop()
    elif status != 0:
        trouble.append(f"the worker ended with {status}: {world.worker.log_end()}")


async def _stop_second(world: World, trouble: list[str]) -> None:
    second, world.second = world.second, None
    if second is not None and (status := await second.stop()) != 0:
        trouble.append(f"the second worker ended with {status}: {second.log_end()}")


@asynccontextmanager
async def _recovery(world: World, plan: Plan) -> AsyncIterator[None]:
    """Whatever ends the holds of dead workers runs beside the gateway, as in a real place.

    The same process for many runs, but where it is to die.
    """
    dies = plan.kind is Kind.WORK_POINT
    if world.work is not None and (dies or world.work.status is not None):
        await world.work.stop()
        world.work = None
    if world.work is None:
        await world.start_work(plan.crash_at if dies else "")
    yield
    if dies and world.work is not None:
        # One that had nothing to do still means to die.
        await world.work.stop()
        world.work = None


async def _serves_again(world: World, plan: Plan, key: str, trouble: list[str]) -> list[Answer]:
    """After the fault a client is served before long; without credit it is told so."""
    answers: list[Answer] = []
    loop = asyncio.get_running_loop()
    until = loop.time() + SERVES_AGAIN_S
    for order in plan.later:
        answers.append(await send(world, key, order))
        is_broke = answers[-1].status == 402 and plan.credits != CREDITS_RICH
        if answers[-1].is_whole or is_broke:
            return answers
        if loop.time() > until:
            break
        await asyncio.sleep(0.2)
    said = [(answer.status, answer.error_code) for answer in answers]
    trouble.append(f"does not serve again: {said}")
    return answers


async def _rest(world: World, account_id: UUID, trouble: list[str]) -> None:
    """Wait until neither a hold nor an outbox entry of the account is left."""
    async with world.till() as till:

        async def look() -> bool | None:
            return True if not await _open(till, account_id) else None

        try:
            await eventually(look, REST_S)
        except TimeoutError:
            trouble.append(f"not at rest: {await _open(till, account_id)}")


async def _open(till: Any, account_id: UUID) -> list[str]:
    prefix = shard_prefix(account_id)
    held, waiting = await till.zcard(f"{prefix}leases"), await till.hlen(f"{prefix}outbox")
    scope = await till.hgetall(account_scope_key(account_id))
    names = (b"held", b"uncommitted", b"open")
    amounts = [f"{n.decode()}={scope[n].decode()}" for n in names if int(scope.get(n, 0))]
    lists = [f"{name}={count}" for name, count in (("holds", held), ("outbox", waiting)) if count]
    return amounts + lists


SELECT_RECEIPTS = """
SELECT request_id, source_reference, client_request_id, outcome, usage_source, input_tokens,
    output_tokens, price_nanos, hold_nanos, overrun_nanos
FROM charge_receipts
WHERE billing_account_id = $1
ORDER BY request_id
"""
SELECT_LEDGER = """
SELECT reason, reference, amount_nanos
FROM credit_ledger
WHERE billing_account_id = $1 AND reason <> 'grant'
"""
SELECT_BALANCE = "SELECT balance_nanos FROM billing_accounts WHERE id = $1"
SELECT_BUDGET = """
SELECT
    v.id, v.budget_nanos,
    (SELECT coalesce(sum(spent_nanos), 0)::bigint FROM scope_spend WHERE virtual_key_id = v.id)
FROM virtual_keys AS v
WHERE v.billing_account_id = $1 AND v.budget_nanos IS NOT NULL
"""


async def _evidence(
    world: World,
    plan: Plan,
    struck: Struck,
    answers: list[Answer],
    account_id: UUID,
    trouble: list[str],
) -> Evidence:
    async with world.book() as conn, open_till(world.till_url) as till:
        receipts = [dict(row) for row in await conn.fetch(SELECT_RECEIPTS, account_id)]
        ledger = await conn.fetch(SELECT_LEDGER, account_id)
        report = await audit(conn, till, at_rest=True)
        balance, available = await _left(conn, till, account_id)
    return Evidence(
        plan=plan,
        struck=struck,
        answers=answers,
        served=await asyncio.to_thread(served, world),
        prompt_tokens=world.prompt_tokens,
        receipts=receipts,
        adjusted=_adjusted(ledger),
        ledger_charged=-sum(row["amount_nanos"] for row in ledger),
        balance=balance,
        till_available=available,
        audit_findings=_findings(report),
        trouble=trouble,
    )


async def _left(conn: Any, till: TillScan, account_id: UUID) -> tuple[int, int | None]:
    """What the key may spend, by the book and by the till: of its budget, if it has one."""
    budget = await conn.fetchrow(SELECT_BUDGET, account_id)
    if budget is None:
        left, limit = await conn.fetchval(SELECT_BALANCE, account_id), None
        owner = Owner(kind="a", owner_id=account_id)
    else:
        key_id, limit, spent = budget
        left = limit - spent
        scope_of = BudgetScope(virtual_key_id=key_id, window="total", starts_at=BEGINNING)
        owner = Owner(kind="b", owner_id=key_id, budget=scope_of)
    scope = await till.read_scope(shard_prefix(account_id), owner)
    if scope is None or scope.posted is None:
        return left, None
    posted = scope.posted if limit is None else limit - scope.posted
    return left, posted - scope.uncommitted - scope.held


def _adjusted(ledger: list[Any]) -> dict[str, int]:
    """Nanos that adjust rows charged, by the id of their request."""
    found: dict[str, int] = {}
    for row in ledger:
        if row["reason"] == "adjust":
            name = id_text(UUID(row["reference"]))
            found[name] = found.get(name, 0) - row["amount_nanos"]
    return found


def _findings(report: Report) -> list[str]:
    return [
        f"audit {check.invariant}: {found.what}, expected {found.expected}, found {found.found}"
        f" {found.ids}"
        for check in report.checks
        for found in check.findings
    ]
