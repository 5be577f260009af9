"""Who is calling. Knows no HTTP and no money."""
