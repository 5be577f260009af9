-- The second wall. Code that acts for a tenant enters as farebox_request and sees the rows of one
-- account, also when a statement forgets to ask for it. Everything else enters as farebox_worker,
-- which sees all rows and still cannot change what is append-only. Nobody who serves owns a table.
-- A role belongs to the whole cluster: another database of it may have made them, or does so now.

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['farebox_request', 'farebox_worker'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION
                WHEN duplicate_object OR unique_violation THEN
                    NULL;
                WHEN insufficient_privilege THEN
                    RAISE EXCEPTION
                        '% may not create roles: let somebody who may run '
                        '"CREATE ROLE farebox_request NOLOGIN; CREATE ROLE farebox_worker NOLOGIN", '
                        'then farebox migrate again', current_user
                        USING ERRCODE = 'insufficient_privilege';
            END;
        END IF;
    END LOOP;
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO farebox_request, farebox_worker', current_schema());
END
$$;

-- Whose rows a transaction of farebox_request may see. NULL, and then none, unless it said so.
CREATE FUNCTION request_account() RETURNS uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN NULLIF(current_setting('farebox.account_id', true), '')::uuid;

-- What is named here and nothing else. Columns that say whose a row is cannot be updated by anybody.

GRANT SELECT, INSERT ON
    users, wallets, billing_accounts, virtual_keys, app_api_keys, operator_keys, model_prices,
    charge_receipts, credit_ledger, scope_spend, idempotent_requests, workers, upstream_credentials
    TO farebox_worker;
GRANT SELECT ON till_epoch, schema_migrations TO farebox_worker;
GRANT DELETE ON idempotent_requests, workers, upstream_credentials TO farebox_worker;
GRANT UPDATE (epoch, server_run_id, changed_at) ON till_epoch TO farebox_worker;
GRANT UPDATE (seen_at) ON workers TO farebox_worker;
GRANT UPDATE (request_id, created_at) ON idempotent_requests TO farebox_worker;
GRANT UPDATE (spent_nanos, version) ON scope_spend TO farebox_worker;
GRANT UPDATE (expires_at, revoked_at) ON operator_keys TO farebox_worker;
GRANT UPDATE (kind, proved_at) ON wallets TO farebox_worker;
GRANT UPDATE (
    balance_nanos, version, status, status_reason, status_changed_at, open_requests_max,
    requests_per_minute, tokens_per_minute, is_system_tenant
) ON billing_accounts TO farebox_worker;

GRANT SELECT ON
    users, wallets, billing_accounts, virtual_keys, app_api_keys, charge_receipts, credit_ledger,
    scope_spend, model_prices
    TO farebox_request;
GRANT INSERT ON virtual_keys, app_api_keys, upstream_credentials TO farebox_request;
-- What is sealed goes in, and comes out only where it is sent to a provider.
GRANT SELECT (virtual_key_id, billing_account_id, provider, created_at)
    ON upstream_credentials TO farebox_request;
GRANT DELETE ON upstream_credentials TO farebox_request;

GRANT UPDATE (budget_nanos, budget_window) ON virtual_keys TO farebox_request, farebox_worker;
GRANT UPDATE (sealed, created_at) ON upstream_credentials TO farebox_request, farebox_worker;
GRANT UPDATE (
    name, prefix, last4, digest, pepper_version, status, expires_at, revoked_at,
    open_requests_max, requests_per_minute, tokens_per_minute, models, ip_allow, scopes,
    previous_digest, previous_expires_at, rotated_at, rotation_digest
) ON app_api_keys TO farebox_request, farebox_worker;

-- FORCE: also whoever owns the tables sees nothing by that alone. A later migration that moves rows
-- lifts it for its own transaction; one that forgets to fails, because row_security is off there.

ALTER TABLE users ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE wallets ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE billing_accounts ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE virtual_keys ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE app_api_keys ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE charge_receipts ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE credit_ledger ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE scope_spend ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE idempotent_requests ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE upstream_credentials ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY every_account ON users TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON wallets TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON billing_accounts TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON virtual_keys TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON app_api_keys TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON charge_receipts TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON credit_ledger TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON scope_spend TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON idempotent_requests TO farebox_worker USING (true) WITH CHECK (true);
CREATE POLICY every_account ON upstream_credentials TO farebox_worker USING (true) WITH CHECK (true);

CREATE POLICY own_account ON billing_accounts TO farebox_request
    USING (id = request_account())
    WITH CHECK (id = request_account());
CREATE POLICY own_account ON virtual_keys TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON app_api_keys TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON charge_receipts TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON credit_ledger TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
CREATE POLICY own_account ON upstream_credentials TO farebox_request
    USING (billing_account_id = request_account())
    WITH CHECK (billing_account_id = request_account());
-- These name the account by way of another table.
CREATE POLICY own_account ON users TO farebox_request
    USING (id IN (SELECT owner_user_id FROM billing_accounts WHERE id = request_account()))
    WITH CHECK (id IN (SELECT owner_user_id FROM billing_accounts WHERE id = request_account()));
CREATE POLICY own_account ON wallets TO farebox_request
    USING (user_id IN (SELECT owner_user_id FROM billing_accounts WHERE id = request_account()))
    WITH CHECK (user_id IN (SELECT owner_user_id FROM billing_accounts WHERE id = request_account()));
CREATE POLICY own_account ON scope_spend TO farebox_request
    USING (virtual_key_id IN (SELECT id FROM virtual_keys WHERE billing_account_id = request_account()))
    WITH CHECK (virtual_key_id IN (SELECT id FROM virtual_keys WHERE billing_account_id = request_account()));
CREATE POLICY own_account ON idempotent_requests TO farebox_request
    USING (virtual_key_id IN (SELECT id FROM virtual_keys WHERE billing_account_id = request_account()))
    WITH CHECK (virtual_key_id IN (SELECT id FROM virtual_keys WHERE billing_account_id = request_account()));
