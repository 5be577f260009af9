-- USDC in: what people want to pay, what became of it, and what the chain has. A unit is the token's
-- smallest (6 decimals), 1,000 nanos exactly. Addresses and hashes are lower case.

CREATE TABLE payment_intents (
    id                  uuid PRIMARY KEY,
    billing_account_id  uuid NOT NULL REFERENCES billing_accounts (id),
    chain_id            bigint NOT NULL CHECK (chain_id > 0),
    token               text NOT NULL CHECK (token ~ '^0x[0-9a-f]{40}$'),
    treasury            text NOT NULL CHECK (treasury ~ '^0x[0-9a-f]{40}$'),
    amount_usd_cents    bigint NOT NULL CHECK (amount_usd_cents BETWEEN 100 AND 1000000),
    units               bigint NOT NULL,
    created_at          timestamptz NOT NULL DEFAULT now(),
    expires_at          timestamptz NOT NULL,
    UNIQUE (id, billing_account_id),
    CONSTRAINT intents_are_whole CHECK (units = amount_usd_cents * 10000),
    CONSTRAINT intents_end CHECK (expires_at > created_at)
);
CREATE INDEX payment_intents_account ON payment_intents (billing_account_id);

CREATE TABLE payment_attempts (
    id                  uuid PRIMARY KEY,
    payment_intent_id   uuid NOT NULL,
    billing_account_id  uuid NOT NULL,
    chain_id            bigint NOT NULL,
    status              text NOT NULL DEFAULT 'CREATED_INTENT',
    error_code          text,
    -- As it was submitted. Whoever submits a hash first has it; nobody gets money by that.
    tx_hash             text CHECK (tx_hash ~ '^0x[0-9a-f]{64}$'),
    created_at          timestamptz NOT NULL DEFAULT now(),
    submitted_at        timestamptz,
    checked_at          timestamptz,
    checked_code        text,
    ended_at            timestamptz,
    UNIQUE (id, billing_account_id),
    UNIQUE (chain_id, tx_hash),
    FOREIGN KEY (payment_intent_id, billing_account_id)
        REFERENCES payment_intents (id, billing_account_id),
    CONSTRAINT attempt_status_is_known CHECK (status IN
        ('CREATED_INTENT', 'PENDING_UNVERIFIED', 'CREDITED', 'REJECTED', 'FAILED')),
    CONSTRAINT attempt_error_is_known CHECK (error_code IN
        ('TX_NOT_FOUND', 'TX_REVERTED', 'TOKEN_TRANSFER_NOT_FOUND', 'SENDER_MISMATCH',
         'RECIPIENT_MISMATCH', 'AMOUNT_MISMATCH', 'INSUFFICIENT_CONFIRMATIONS', 'RECEIPT_NOT_FOUND',
         'INTENT_EXPIRED', 'RPC_ERROR')),
    CONSTRAINT attempt_errors_end CHECK
        ((status IN ('REJECTED', 'FAILED')) = (error_code IS NOT NULL)),
    -- A node that lags or does not answer rejects nobody.
    CONSTRAINT attempts_outlast_the_nodes CHECK (error_code NOT IN
        ('TX_NOT_FOUND', 'RPC_ERROR', 'INSUFFICIENT_CONFIRMATIONS')),
    CONSTRAINT attempts_end_once CHECK
        ((status IN ('CREDITED', 'REJECTED', 'FAILED')) = (ended_at IS NOT NULL)),
    CONSTRAINT attempts_have_one_hash CHECK ((tx_hash IS NULL) = (submitted_at IS NULL)),
    CONSTRAINT intents_have_no_hash CHECK (status <> 'CREATED_INTENT' OR tx_hash IS NULL)
);
CREATE INDEX payment_attempts_account ON payment_attempts (billing_account_id, id DESC);
CREATE INDEX payment_attempts_intent ON payment_attempts (payment_intent_id);
CREATE INDEX payment_attempts_open ON payment_attempts (status, checked_at)
    WHERE status IN ('CREATED_INTENT', 'PENDING_UNVERIFIED');

-- One row for each Transfer log to the treasury; the log's place inside its receipt survives a reorg.
CREATE TABLE chain_transfers (
    chain_id            bigint NOT NULL CHECK (chain_id > 0),
    tx_hash             text NOT NULL CHECK (tx_hash ~ '^0x[0-9a-f]{64}$'),
    ordinal             integer NOT NULL CHECK (ordinal >= 0),
    sender              text NOT NULL CHECK (sender ~ '^0x[0-9a-f]{40}$'),
    units               bigint NOT NULL CHECK (units > 0),
    nanos               bigint NOT NULL,
    block_number        bigint NOT NULL CHECK (block_number >= 0),
    block_hash          text NOT NULL CHECK (block_hash ~ '^0x[0-9a-f]{64}$'),
    block_time          timestamptz NOT NULL,
    state               text NOT NULL,
    -- Why it waits in suspense.
    suspense_reason     text NOT NULL DEFAULT '',
    billing_account_id  uuid REFERENCES billing_accounts (id),
    payment_attempt_id  uuid,
    -- How often it was credited: more than once only after reversals.
    generation          integer NOT NULL DEFAULT 0 CHECK (generation >= 0),
    seen_at             timestamptz NOT NULL DEFAULT now(),
    changed_at          timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (chain_id, tx_hash, ordinal),
    FOREIGN KEY (payment_attempt_id, billing_account_id)
        REFERENCES payment_attempts (id, billing_account_id),
    CONSTRAINT transfers_are_whole CHECK (nanos = units * 1000),
    CONSTRAINT transfer_state_is_known CHECK (state IN ('seen', 'suspense', 'credited', 'reversed')),
    CONSTRAINT suspense_has_a_reason CHECK
        ((state = 'suspense') = (suspense_reason <> '')),
    CONSTRAINT suspense_reason_is_known CHECK
        (suspense_reason IN ('', 'unknown_sender', 'minted', 'from_treasury', 'from_sweep', 'too_large', 'held_back')),
    CONSTRAINT credit_has_an_account CHECK
        (state <> 'credited' OR (billing_account_id IS NOT NULL AND generation > 0)),
    CONSTRAINT attempts_have_an_account CHECK
        (payment_attempt_id IS NULL OR billing_account_id IS NOT NULL)
);
CREATE INDEX chain_transfers_account ON chain_transfers (billing_account_id);
CREATE INDEX chain_transfers_attempt ON chain_transfers (payment_attempt_id);
CREATE INDEX chain_transfers_suspense ON chain_transfers (sender) WHERE state = 'suspense';
CREATE INDEX chain_transfers_block ON chain_transfers (chain_id, block_number);

-- No foreign key leads to the account: whoever holds an attempt must not wait for one who holds the
-- account and wants the attempt.
CREATE TABLE payment_events (
    id                  bigint PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
    event               text NOT NULL,
    billing_account_id  uuid,
    payment_attempt_id  uuid,
    chain_id            bigint,
    tx_hash             text,
    ordinal             integer,
    from_status         text,
    to_status           text,
    error_code          text,
    metadata            jsonb NOT NULL DEFAULT '{}',
    created_at          timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (payment_attempt_id, billing_account_id)
        REFERENCES payment_attempts (id, billing_account_id),
    FOREIGN KEY (chain_id, tx_hash, ordinal)
        REFERENCES chain_transfers (chain_id, tx_hash, ordinal),
    CONSTRAINT event_is_known CHECK (event IN
        ('INTENT_CREATED', 'TX_SUBMITTED', 'VERIFICATION_ATTEMPTED', 'STATUS_CHANGED',
         'TRANSFER_CHANGED')),
    CONSTRAINT events_are_of_something CHECK
        ((event = 'TRANSFER_CHANGED' AND ordinal IS NOT NULL AND tx_hash IS NOT NULL
          AND chain_id IS NOT NULL)
         OR (event <> 'TRANSFER_CHANGED' AND payment_attempt_id IS NOT NULL
             AND billing_account_id IS NOT NULL))
);
CREATE INDEX payment_events_attempt ON payment_events (payment_attempt_id, id);
CREATE INDEX payment_events_transfer ON payment_events (chain_id, tx_hash, ordinal);

-- How far the chain was read for transfers of a token to a treasury.
CREATE TABLE chain_cursors (
    chain_id      bigint NOT NULL CHECK (chain_id > 0),
    token         text NOT NULL CHECK (token ~ '^0x[0-9a-f]{40}$'),
    treasury      text NOT NULL CHECK (treasury ~ '^0x[0-9a-f]{40}$'),
    block_number  bigint NOT NULL CHECK (block_number >= 0),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (chain_id, token, treasury)
);

CREATE TRIGGER payment_events_append_only
    BEFORE UPDATE OR DELETE ON payment_events
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_events_no_truncate
    BEFORE TRUNCATE ON payment_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_intents_append_only
    BEFORE UPDATE OR DELETE ON payment_intents
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_intents_no_truncate
    BEFORE TRUNCATE ON payment_intents
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_attempts_no_delete
    BEFORE DELETE ON payment_attempts
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_attempts_no_truncate
    BEFORE TRUNCATE ON payment_attempts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER chain_transfers_no_delete
    BEFORE DELETE ON chain_transfers
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER chain_transfers_no_truncate
    BEFORE TRUNCATE ON chain_transfers
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- The state machine, whoever asks. Nothing is CREDITED without a transfer that is.
CREATE FUNCTION guard_attempt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.status = 'CREATED_INTENT' THEN
            RETURN NEW;
        END IF;
        RAISE EXCEPTION 'an attempt begins as CREATED_INTENT' USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN (
        ('CREATED_INTENT', 'PENDING_UNVERIFIED'), ('CREATED_INTENT', 'FAILED'),
        ('PENDING_UNVERIFIED', 'CREDITED'), ('PENDING_UNVERIFIED', 'REJECTED'),
        ('PENDING_UNVERIFIED', 'FAILED')) THEN
        RAISE EXCEPTION 'an attempt does not go from % to %', OLD.status, NEW.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF (NEW.id, NEW.payment_intent_id, NEW.billing_account_id, NEW.chain_id)
        IS DISTINCT FROM (OLD.id, OLD.payment_intent_id, OLD.billing_account_id, OLD.chain_id)
        OR (OLD.tx_hash IS NOT NULL AND NEW.tx_hash IS DISTINCT FROM OLD.tx_hash) THEN
        RAISE EXCEPTION 'an attempt stays whose and what it is' USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status = 'CREDITED' AND OLD.status <> 'CREDITED' AND NOT EXISTS (
        SELECT FROM chain_transfers
        WHERE payment_attempt_id = NEW.id AND billing_account_id = NEW.billing_account_id
            AND state = 'credited') THEN
        RAISE EXCEPTION 'no transfer was credited for this attempt'
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER payment_attempts_guard
    BEFORE INSERT OR UPDATE ON payment_attempts
    FOR EACH ROW EXECUTE FUNCTION guard_attempt();

-- A transfer that is credited stays what it is until it is reversed; each credit is one generation.
CREATE FUNCTION guard_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> OLD.state AND (OLD.state, NEW.state) NOT IN (
        ('seen', 'suspense'), ('seen', 'credited'), ('seen', 'reversed'),
        ('suspense', 'credited'), ('suspense', 'reversed'), ('credited', 'reversed'),
        ('reversed', 'seen'), ('reversed', 'suspense'), ('reversed', 'credited')) THEN
        RAISE EXCEPTION 'a transfer does not go from % to %', OLD.state, NEW.state
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF (NEW.chain_id, NEW.tx_hash, NEW.ordinal)
        IS DISTINCT FROM (OLD.chain_id, OLD.tx_hash, OLD.ordinal)
        OR (OLD.state = 'credited'
            AND (NEW.sender, NEW.units, NEW.nanos, NEW.billing_account_id)
                IS DISTINCT FROM (OLD.sender, OLD.units, OLD.nanos, OLD.billing_account_id)) THEN
        RAISE EXCEPTION 'a transfer that is credited stays what it is'
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.generation - OLD.generation
        <> (NEW.state = 'credited' AND OLD.state <> 'credited')::integer THEN
        RAISE EXCEPTION 'each credit of a transfer is one generation'
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER chain_transfers_guard
    BEFORE UPDATE ON chain_transfers
    FOR EACH ROW EXECUTE FUNCTION guard_transfer();

GRANT SELECT, INSERT ON
    payment_intents, payment_attempts, payment_events, chain_transfers, chain_cursors
    TO farebox_worker;
GRANT UPDATE (block_number, updated_at) ON chain_cursors TO farebox_worker;
GRANT UPDATE (
    sender, units, nanos, block_number, block_hash, block_time, state, suspense_reason,
    billing_account_id, payment_attempt_id, generation, changed_at
) ON chain_transfers TO farebox_worker;
GRANT SELECT, INSERT ON payment_intents, payment_attempts, payment_events TO farebox_request;
GRANT SELECT ON chain_transfers TO farebox_request;
GRANT UPDATE (status, error_code, tx_hash, submitted_at, ended_at)
    ON payment_attempts TO farebox_request, farebox_worker;
GRANT UPDATE (checked_at, checked_code) ON payment_attempts TO farebox_worker;

ALTER TABLE payment_intents ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE payment_attempts ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE payment_events ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE chain_transfers ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY every_account ON payment_intents TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON payment_attempts TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON payment_events TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON chain_transfers TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY own_account ON payment_intents TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON payment_attempts TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON payment_events TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON chain_transfers TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
