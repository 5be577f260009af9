"""Real Postgres and real Valkey as children of this process, from wheels: nothing to install."""
