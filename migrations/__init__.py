"""Forward-only numbered SQL and the small runner that applies it."""
