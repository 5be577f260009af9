"""Whatever money or keys refuse has an answer at the edge: a row that is missing is a 500."""

import inspect
from types import ModuleType

import pytest

from billing import errors as billing_errors
from gateway.errors import mapped_errors
from keys import errors as keys_errors

# Never raised themselves.
BASES = {billing_errors.BillingError, billing_errors.Refusal, keys_errors.KeysError}


@pytest.mark.parametrize("module", [billing_errors, keys_errors], ids=lambda m: m.__name__)
def test_every_error_has_a_row(module: ModuleType) -> None:
    classes = {
        found
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, Exception) and found.__module__ == module.__name__
    }

    assert len(classes) > 8
    assert classes - BASES <= mapped_errors()
