-- Limits of accounts and keys, budgets of virtual keys, keys that are rotated, execution grants,
-- and credentials for upstreams that belong to one virtual key.

ALTER TABLE billing_accounts
    -- Per minute; NULL: what the settings say.
    ADD COLUMN requests_per_minute integer CHECK (requests_per_minute > 0),
    ADD COLUMN tokens_per_minute integer CHECK (tokens_per_minute > 0),
    -- Why an operator froze or thawed it, and when.
    ADD COLUMN status_reason text NOT NULL DEFAULT '' CHECK (length(status_reason) <= 500),
    ADD COLUMN status_changed_at timestamptz;
CREATE UNIQUE INDEX billing_accounts_one_system_tenant
    ON billing_accounts (is_system_tenant) WHERE is_system_tenant;

ALTER TABLE wallets
    ADD COLUMN kind text NOT NULL DEFAULT 'eoa' CHECK (kind IN ('eoa', 'contract')),
    ADD COLUMN proved_at timestamptz NOT NULL DEFAULT now();

ALTER TABLE virtual_keys
    -- What may be spent in each window (of UTC; weeks begin on Monday). NULL: no budget.
    ADD COLUMN budget_nanos bigint CHECK (budget_nanos BETWEEN 0 AND 9007199254740991),
    ADD COLUMN budget_window text CHECK (budget_window IN ('day', 'week', 'month', 'total')),
    ADD CONSTRAINT budget_is_whole CHECK ((budget_nanos IS NULL) = (budget_window IS NULL));

ALTER TABLE app_api_keys
    -- A grant is a key for one execution: it expires, has a budget, and may name its run and graph.
    ADD COLUMN kind text NOT NULL DEFAULT 'key' CHECK (kind IN ('key', 'grant')),
    ADD COLUMN run_id text CHECK (length(run_id) BETWEEN 1 AND 200),
    ADD COLUMN graph_id text CHECK (length(graph_id) BETWEEN 1 AND 200),
    ADD COLUMN requests_per_minute integer CHECK (requests_per_minute > 0),
    ADD COLUMN tokens_per_minute integer CHECK (tokens_per_minute > 0),
    -- Public model ids; NULL: every model.
    ADD COLUMN models text[] CHECK (cardinality(models) BETWEEN 1 AND 200),
    -- Addresses and networks; NULL: from anywhere.
    ADD COLUMN ip_allow cidr[] CHECK (cardinality(ip_allow) BETWEEN 1 AND 100),
    ADD COLUMN scopes text[] NOT NULL DEFAULT '{infer,account}'
        CHECK (scopes <@ '{infer,account,payments}' AND cardinality(scopes) > 0),
    -- While a rotation lasts, the secret before it works too.
    ADD COLUMN previous_digest bytea UNIQUE CHECK (length(previous_digest) = 32),
    ADD COLUMN previous_expires_at timestamptz,
    ADD COLUMN rotated_at timestamptz,
    -- Of the Idempotency-Key of the last rotation.
    ADD COLUMN rotation_digest bytea CHECK (length(rotation_digest) = 32),
    ADD CONSTRAINT previous_ends
        CHECK ((previous_digest IS NULL) = (previous_expires_at IS NULL)),
    ADD CONSTRAINT grants_end CHECK (kind <> 'grant' OR expires_at IS NOT NULL),
    ADD CONSTRAINT runs_are_granted CHECK (kind = 'grant' OR (run_id IS NULL AND graph_id IS NULL));

ALTER TABLE operator_keys
    ADD COLUMN expires_at timestamptz;

-- Encrypted, and never shown again: what is sent to a provider for calls of this virtual key.
CREATE TABLE upstream_credentials (
    virtual_key_id      uuid NOT NULL,
    billing_account_id  uuid NOT NULL,
    provider            text NOT NULL CHECK (length(provider) BETWEEN 1 AND 256),
    sealed              bytea NOT NULL CHECK (length(sealed) BETWEEN 28 AND 8192),
    created_at          timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (virtual_key_id, provider),
    FOREIGN KEY (virtual_key_id, billing_account_id)
        REFERENCES virtual_keys (id, billing_account_id)
);
CREATE INDEX upstream_credentials_account ON upstream_credentials (billing_account_id);

ALTER TABLE charge_receipts
    -- The window of the budget that the request was held on, which began before `started_at`.
    ADD COLUMN budget_window text NOT NULL DEFAULT ''
    CONSTRAINT budget_window_is_known CHECK (budget_window IN ('', 'day', 'week', 'month', 'total'));

-- scope_spend: one row for each virtual key and day (of UTC) on which it spent something, by the
-- start of its requests. Other windows are sums of days. The version counts what was posted.
INSERT INTO scope_spend (virtual_key_id, window_start, spent_nanos, version)
SELECT
    r.virtual_key_id, date_trunc('day', r.started_at, 'UTC'),
    sum(r.price_nanos - coalesce(l.amount_nanos, 0)),
    count(*) FILTER (WHERE r.price_nanos > 0) + count(l.amount_nanos)
FROM charge_receipts AS r
LEFT JOIN credit_ledger AS l ON l.reason = 'adjust' AND l.reference = r.request_id::text
GROUP BY r.virtual_key_id, date_trunc('day', r.started_at, 'UTC')
HAVING count(*) FILTER (WHERE r.price_nanos > 0) + count(l.amount_nanos) > 0;
