"""The campaign's plan: repeatable, and every kind and crash point has its turn."""

from collections import Counter

from tests.faults.plan import MODELS, WEIGHTS, Kind, draw, turns
from tests.faults.points import POINTS

ROUND = len(turns())


def test_a_run_is_the_same_alone_as_in_its_campaign() -> None:
    together = [draw(7, number) for number in range(5)]

    assert [draw(7, number) for number in (4, 0, 3, 2, 1)] == [
        together[number] for number in (4, 0, 3, 2, 1)
    ]
    assert draw(8, 0) != together[0]


def test_each_round_has_every_crash_point_by_its_turns_and_every_kind_by_its_weight() -> None:
    for first in (0, ROUND):
        plans = [draw(7, number) for number in range(first, first + ROUND)]
        points = Counter(plan.point.name for plan in plans if plan.point is not None)
        kinds = Counter(plan.kind for plan in plans if plan.point is None)

        assert points == {point.name: point.turns for point in POINTS.values()}
        assert kinds == WEIGHTS
    assert set(WEIGHTS) | {Kind.WORKER_POINT, Kind.WORK_POINT} == set(Kind)


def test_no_two_requests_of_a_campaign_have_the_same_prompt_or_name() -> None:
    orders = [o for n in range(60) for p in [draw(7, n)] for o in (*p.orders, *p.later)]

    assert len({order.prompt for order in orders}) == len(orders)
    assert len({order.name for order in orders}) == len(orders)
    assert {order.model for order in orders} == set(MODELS)
