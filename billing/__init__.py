"""What a request costs and who owes it. Knows no HTTP."""
