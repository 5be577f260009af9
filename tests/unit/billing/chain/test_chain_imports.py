"""What payments may not cost those who only serve."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("billing.chain.quorum", ("web3", "eth_account", "siwe", "coincurve")),
        ("billing.chain.verify", ("web3", "httpx", "asyncio")),
    ],
)
def test_reading_the_chain_does_not_load(module, absent):
    found = f"print([name for name in {absent!r} if name in sys.modules])"
    code = f"import sys, {module}; {found}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "[]"
