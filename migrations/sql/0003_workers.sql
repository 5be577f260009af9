-- Which workers live, by the book's clock: whose holds a sweeper may end, and whether anybody has
-- to place holds again when the till was lost.
CREATE TABLE workers (
    name        text PRIMARY KEY,
    started_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now()
);
