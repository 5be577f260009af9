"""What is counted is shown, once, by this worker and by the others."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from billing.prices import CostSource
from billing.receipts import ChargeReceipt, Outcome, Provenance
from billing.usage import UsageSource
from config.ids import new_id
from gateway.metrics import Metrics


def receipt(**fields: Any) -> ChargeReceipt:
    values: dict[str, Any] = {
        "request_id": new_id(),
        "source_reference": "",
        "billing_account_id": new_id(),
        "virtual_key_id": new_id(),
        "app_key_id": None,
        "protocol": "chat.completions",
        "provider": "p",
        "requested_model": "m",
        "reported_cost_usd": Decimal("0.1"),
        "markup_bps": 10_000,
        "hold_nanos": 0,
        "outcome": Outcome.COMPLETE,
        "provenance": Provenance.RESPONSE,
        "started_at": datetime.now(UTC),
        "finished_at": datetime.now(UTC),
    }
    return ChargeReceipt(**{**values, **fields})


def shown(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_receipts_are_counted_by_model_and_by_their_end() -> None:
    metrics = Metrics()
    metrics.count_receipt(
        receipt(
            input_tokens=7,
            output_tokens=3,
            cached_tokens=2,
            price_nanos=1_500_000_000,
            provider_cost_nanos=500_000_000,
            overrun_nanos=250_000_000,
            cost_source=CostSource.PROVIDER,
            usage_source=UsageSource.PROVIDER,
        )
    )
    first = shown(metrics)
    metrics.count_receipt(receipt(input_tokens=1, outcome=Outcome.VOIDED))
    values = shown(metrics)

    assert first['farebox_tokens_total{model="m",type="input"}'] == 7
    assert values['farebox_tokens_total{model="m",type="input"}'] == 8
    assert values['farebox_tokens_total{model="m",type="output"}'] == 3
    assert values['farebox_tokens_total{model="m",type="cached"}'] == 2
    assert 'farebox_tokens_total{model="m",type="reasoning"}' not in values
    assert values["farebox_revenue_usd_total"] == 1.5
    assert values["farebox_provider_cost_usd_total"] == 0.5
    assert values["farebox_overrun_usd_total"] == 0.25
    complete = 'outcome="complete",usage_source="provider"'
    assert values[f'farebox_receipts_total{{cost_source="provider",{complete}}}'] == 1
    voided = 'outcome="voided",usage_source="none"'
    assert values[f'farebox_receipts_total{{cost_source="none",{voided}}}'] == 1


def test_an_observation_is_in_every_bucket_from_its_own_on() -> None:
    metrics = Metrics()
    for value in (0.0, 0.0002, 0.00021, 0.5, 9.0):
        metrics.overhead.observe(value)
        metrics.ttft("p", "m", value)
    values = shown(metrics)

    name = "farebox_overhead_seconds"
    assert values[f'{name}_bucket{{le="0.0002"}}'] == 2
    assert values[f'{name}_bucket{{le="0.0005"}}'] == 3
    assert values[f'{name}_bucket{{le="0.5"}}'] == 4
    assert values[f'{name}_bucket{{le="+Inf"}}'] == 5
    assert values[f"{name}_count"] == 5
    assert abs(values[f"{name}_sum"] - 9.50041) < 1e-9
    ttft = "farebox_upstream_ttft_seconds"
    assert values[f'{ttft}_bucket{{le="0.05",model="m",provider="p"}}'] == 3
    assert values[f'{ttft}_count{{model="m",provider="p"}}'] == 5


def test_reading_twice_counts_once() -> None:
    metrics = Metrics()
    metrics.count_request("/v1", 200, "")
    metrics.count_request("/v1", 200, "")
    metrics.overhead.observe(0.1)

    first, second = shown(metrics), shown(metrics)

    assert first == second
    assert first['farebox_http_requests_total{code="",route="/v1",status="200"}'] == 2


SCRIPT = """
import os, sys
from gateway.metrics import Metrics
metrics = Metrics(os.environ["PROMETHEUS_MULTIPROC_DIR"])
metrics.count_request("/v1", 200, "")
metrics.overhead.observe(0.3)
metrics.fold()
sys.stdout.buffer.write(metrics.render())
"""


def test_each_worker_answers_for_all(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    texts = [
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True).stdout.decode()
        for _ in range(2)
    ]

    line = 'farebox_http_requests_total{code="",route="/v1",status="200"}'
    assert [f"{line} {n}.0" in text for n, text in zip((1, 2), texts, strict=True)] == [True, True]
    assert 'farebox_overhead_seconds_bucket{le="0.5"} 2.0' in texts[1]
