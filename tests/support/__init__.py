"""Tools that tests run against or drive the gateway with. Nothing here is collected."""
