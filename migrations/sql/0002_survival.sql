-- What it takes to lose nothing through crashes: which till an epoch belongs to, which attempts at
-- providers failed before one answered, and which requests a client wants to be done only once.

ALTER TABLE till_epoch
    -- The run id that the till's server reported when this epoch began. A restarted or replaced
    -- server has another one. '' when it tells none.
    ADD COLUMN server_run_id text NOT NULL DEFAULT '';

ALTER TABLE charge_receipts
    -- Attempts before the one that the receipt names, in order, as our code writes them.
    ADD COLUMN failed_attempts jsonb NOT NULL DEFAULT '[]'
    CONSTRAINT failed_attempts_is_list CHECK (jsonb_typeof(failed_attempts) = 'array');

-- One row for each Idempotency-Key in use; the only table here whose rows are deleted, by age.
CREATE TABLE idempotent_requests (
    virtual_key_id  uuid NOT NULL REFERENCES virtual_keys (id),
    key_digest      bytea NOT NULL CHECK (length(key_digest) = 32),
    body_digest     bytea NOT NULL CHECK (length(body_digest) = 32),
    request_id      uuid NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (virtual_key_id, key_digest)
);
CREATE INDEX idempotent_requests_age ON idempotent_requests (created_at);
