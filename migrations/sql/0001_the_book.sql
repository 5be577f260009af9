-- The book: who owns credit, who may spend it, what was charged and why.
-- Money is bigint nanos (1e-9 USD). 9007199254740991 = 2^53 - 1: the till computes in doubles.

CREATE TABLE users (
    id          uuid PRIMARY KEY,
    label       text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE wallets (
    address     text PRIMARY KEY CHECK (address ~ '^0x[0-9a-fA-F]{40}$'),
    user_id     uuid NOT NULL REFERENCES users (id),
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX wallets_address_lower ON wallets (lower(address));
CREATE INDEX wallets_user ON wallets (user_id);

CREATE TABLE billing_accounts (
    id                 uuid PRIMARY KEY,
    owner_user_id      uuid NOT NULL UNIQUE REFERENCES users (id),
    is_system_tenant   boolean NOT NULL DEFAULT false,
    balance_nanos      bigint NOT NULL DEFAULT 0
                       CHECK (balance_nanos BETWEEN -9007199254740991 AND 9007199254740991),
    version            bigint NOT NULL DEFAULT 0 CHECK (version >= 0),
    status             text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'frozen')),
    open_requests_max  integer CHECK (open_requests_max > 0),
    created_at         timestamptz NOT NULL DEFAULT now(),
    CHECK (version > 0 OR balance_nanos = 0)
);

CREATE TABLE virtual_keys (
    id                  uuid PRIMARY KEY,
    billing_account_id  uuid NOT NULL REFERENCES billing_accounts (id),
    is_default          boolean NOT NULL DEFAULT false,
    created_at          timestamptz NOT NULL DEFAULT now(),
    UNIQUE (id, billing_account_id)
);
CREATE UNIQUE INDEX virtual_keys_one_default ON virtual_keys (billing_account_id) WHERE is_default;

CREATE TABLE app_api_keys (
    id                  uuid PRIMARY KEY,
    billing_account_id  uuid NOT NULL,
    virtual_key_id      uuid NOT NULL UNIQUE,
    name                text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    prefix              text NOT NULL,
    last4               text NOT NULL CHECK (length(last4) = 4),
    digest              bytea NOT NULL UNIQUE CHECK (length(digest) = 32),
    pepper_version      smallint NOT NULL DEFAULT 1,
    status              text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'revoked')),
    expires_at          timestamptz,
    open_requests_max   integer CHECK (open_requests_max > 0),
    created_at          timestamptz NOT NULL DEFAULT now(),
    revoked_at          timestamptz,
    CHECK ((status = 'revoked') = (revoked_at IS NOT NULL)),
    UNIQUE (id, virtual_key_id),
    -- A key spends from the account that owns its virtual key, and from no other.
    FOREIGN KEY (virtual_key_id, billing_account_id)
        REFERENCES virtual_keys (id, billing_account_id)
);
CREATE INDEX app_api_keys_account ON app_api_keys (billing_account_id, id);

CREATE TABLE operator_keys (
    id              uuid PRIMARY KEY,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    last4           text NOT NULL CHECK (length(last4) = 4),
    digest          bytea NOT NULL UNIQUE CHECK (length(digest) = 32),
    pepper_version  smallint NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    revoked_at      timestamptz
);

-- One row for each set of rates a model ever had. Rates are nanos per million tokens.
CREATE TABLE model_prices (
    price_version         bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    model                 text NOT NULL,
    source                text NOT NULL CHECK (source IN ('config', 'operator')),
    effective_from        timestamptz NOT NULL,
    input_rate            bigint NOT NULL CHECK (input_rate >= 0),
    output_rate           bigint NOT NULL CHECK (output_rate >= 0),
    cached_input_rate     bigint NOT NULL CHECK (cached_input_rate >= 0),
    cache_write_rate      bigint NOT NULL CHECK (cache_write_rate >= 0),
    reasoning_rate        bigint NOT NULL CHECK (reasoning_rate >= 0),
    audio_input_rate      bigint CHECK (audio_input_rate >= 0),
    audio_output_rate     bigint CHECK (audio_output_rate >= 0),
    created_at            timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX model_prices_current ON model_prices (model, effective_from DESC, price_version DESC);

-- One receipt for each admitted request, voided ones included.
CREATE TABLE charge_receipts (
    request_id           uuid PRIMARY KEY,
    source_system        text NOT NULL,
    source_reference     text NOT NULL,
    billing_account_id   uuid NOT NULL REFERENCES billing_accounts (id),
    virtual_key_id       uuid NOT NULL,
    app_key_id           uuid,
    charge_reason        text NOT NULL CHECK (charge_reason IN ('llm_call')),
    protocol             text NOT NULL,
    provider             text NOT NULL,
    requested_model      text NOT NULL,
    served_model         text NOT NULL DEFAULT '',
    input_tokens         bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens        bigint NOT NULL CHECK (output_tokens >= 0),
    cached_tokens        bigint NOT NULL DEFAULT 0 CHECK (cached_tokens >= 0),
    cache_write_tokens   bigint NOT NULL DEFAULT 0 CHECK (cache_write_tokens >= 0),
    reasoning_tokens     bigint NOT NULL DEFAULT 0 CHECK (reasoning_tokens >= 0),
    audio_input_tokens   bigint NOT NULL DEFAULT 0 CHECK (audio_input_tokens >= 0),
    audio_output_tokens  bigint NOT NULL DEFAULT 0 CHECK (audio_output_tokens >= 0),
    reported_cost_usd    numeric CHECK (reported_cost_usd >= 0),
    provider_cost_nanos  bigint NOT NULL CHECK (provider_cost_nanos >= 0),
    price_nanos          bigint NOT NULL CHECK (price_nanos >= 0),
    markup_bps           integer NOT NULL CHECK (markup_bps >= 10000),
    price_version        bigint REFERENCES model_prices (price_version),
    hold_nanos           bigint NOT NULL CHECK (hold_nanos BETWEEN 0 AND 9007199254740991),
    overrun_nanos        bigint NOT NULL DEFAULT 0 CHECK (overrun_nanos >= 0),
    cost_source          text NOT NULL CHECK (cost_source IN ('provider', 'price_book', 'none')),
    usage_source         text NOT NULL
                         CHECK (usage_source IN ('provider', 'counted', 'checkpoint', 'none')),
    outcome              text NOT NULL
                         CHECK (outcome IN ('complete', 'client_left', 'upstream_failed',
                                            'credit_exhausted', 'recovered', 'voided')),
    provenance           text NOT NULL CHECK (provenance IN ('stream', 'response')),
    upstream_id          text NOT NULL DEFAULT '',
    upstream_request_id  text NOT NULL DEFAULT '',
    run_id               text NOT NULL DEFAULT '',
    attempt              integer NOT NULL DEFAULT 1 CHECK (attempt >= 1),
    graph_id             text NOT NULL DEFAULT '',
    client_retry_count   integer NOT NULL DEFAULT 0 CHECK (client_retry_count >= 0),
    client_request_id    text NOT NULL DEFAULT '',
    started_at           timestamptz NOT NULL,
    first_byte_at        timestamptz,
    finished_at          timestamptz NOT NULL,
    posted_at            timestamptz NOT NULL DEFAULT now(),
    UNIQUE (source_system, source_reference),
    FOREIGN KEY (virtual_key_id, billing_account_id)
        REFERENCES virtual_keys (id, billing_account_id),
    FOREIGN KEY (app_key_id, virtual_key_id) REFERENCES app_api_keys (id, virtual_key_id),
    CONSTRAINT price_within_hold CHECK (price_nanos <= hold_nanos),
    CONSTRAINT voided_costs_nothing CHECK (outcome <> 'voided' OR price_nanos = 0),
    CONSTRAINT unpriced_costs_nothing CHECK (cost_source <> 'none' OR price_nanos = 0),
    CONSTRAINT book_price_has_version CHECK (cost_source <> 'price_book' OR price_version IS NOT NULL),
    CONSTRAINT reported_cost_is_kept
        CHECK ((cost_source = 'provider') = (reported_cost_usd IS NOT NULL)),
    CONSTRAINT kinds_within_totals
        CHECK (cached_tokens + cache_write_tokens + audio_input_tokens <= input_tokens
               AND reasoning_tokens + audio_output_tokens <= output_tokens),
    CONSTRAINT overrun_means_capped CHECK (overrun_nanos = 0 OR price_nanos = hold_nanos)
);
CREATE INDEX charge_receipts_account ON charge_receipts (billing_account_id, request_id DESC);

-- Append-only. Gaplessness and the running balance are constraints, not hopes: every row but an
-- account's first points at the row before it and must start from that row's balance.
CREATE TABLE credit_ledger (
    billing_account_id    uuid NOT NULL REFERENCES billing_accounts (id),
    seq                   bigint NOT NULL CHECK (seq > 0),
    previous_seq          bigint GENERATED ALWAYS AS (NULLIF(seq - 1, 0)) STORED,
    balance_before_nanos  bigint NOT NULL,
    amount_nanos          bigint NOT NULL CHECK (amount_nanos <> 0),
    balance_after_nanos   bigint NOT NULL
                          CHECK (balance_after_nanos BETWEEN -9007199254740991 AND 9007199254740991),
    reason                text NOT NULL CHECK (reason IN ('charge', 'grant', 'deposit', 'adjust', 'reversal')),
    reference             text NOT NULL CHECK (reference <> ''),
    virtual_key_id        uuid,
    app_key_id            uuid,
    metadata              jsonb NOT NULL DEFAULT '{}',
    posted_at             timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (billing_account_id, seq),
    UNIQUE (reason, reference),
    UNIQUE (billing_account_id, seq, balance_after_nanos),
    CHECK (balance_after_nanos = balance_before_nanos + amount_nanos),
    CHECK (seq > 1 OR balance_before_nanos = 0),
    CHECK (CASE reason WHEN 'charge' THEN amount_nanos < 0
                       WHEN 'grant' THEN amount_nanos > 0
                       WHEN 'deposit' THEN amount_nanos > 0
                       ELSE true END),
    FOREIGN KEY (billing_account_id, previous_seq, balance_before_nanos)
        REFERENCES credit_ledger (billing_account_id, seq, balance_after_nanos)
);

-- Spend of a budget scope in a window; the till's budget scopes are seeded from it.
CREATE TABLE scope_spend (
    virtual_key_id  uuid NOT NULL REFERENCES virtual_keys (id),
    window_start    timestamptz NOT NULL,
    spent_nanos     bigint NOT NULL DEFAULT 0 CHECK (spent_nanos BETWEEN 0 AND 9007199254740991),
    version         bigint NOT NULL DEFAULT 0 CHECK (version >= 0),
    PRIMARY KEY (virtual_key_id, window_start)
);

CREATE TABLE till_epoch (
    only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    epoch       bigint NOT NULL CHECK (epoch > 0),
    changed_at  timestamptz NOT NULL DEFAULT now()
);
INSERT INTO till_epoch (epoch) VALUES (1);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: mend a mistake with a new row', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER charge_receipts_append_only
    BEFORE UPDATE OR DELETE ON charge_receipts
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER charge_receipts_no_truncate
    BEFORE TRUNCATE ON charge_receipts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credit_ledger_append_only
    BEFORE UPDATE OR DELETE ON credit_ledger
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credit_ledger_no_truncate
    BEFORE TRUNCATE ON credit_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER model_prices_append_only
    BEFORE UPDATE OR DELETE ON model_prices
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER model_prices_no_truncate
    BEFORE TRUNCATE ON model_prices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
