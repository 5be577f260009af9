"""What can be set (settings), where it comes from (load) and what it must be (rules)."""
