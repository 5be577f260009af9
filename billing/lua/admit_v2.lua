#!lua
-- admit: place one hold on every scope of a request, or on none. Idempotent on the request id.
-- KEYS  1 epoch   2 outbox   3 hold   4 leases   5.. scopes
-- ARGV  1 epoch   2 request id   3 hold, nanos   4 lease, ms   5 worker   6 draft of the receipt
--       7.. for each scope: kind (A account, B budget, K key), open requests at most (0: no limit),
--       limit in nanos (B only, else 0)
-- Reply {status, scope index, available nanos or open requests}
--       status: admitted, exists, lost (no epoch: what was here is gone), epoch (of another one),
--       cold (this scope was not seeded in this epoch), frozen, revoked, short, busy
-- No key here has a time to live: a hold that vanished by itself would mint credit.
local epoch = redis.call('GET', KEYS[1])
if not epoch then return {'lost', 0, 0} end
if epoch ~= ARGV[1] then return {'epoch', 0, 0} end
if redis.call('EXISTS', KEYS[3]) == 1 or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then
  return {'exists', 0, 0}
end

local nanos = tonumber(ARGV[3])
local busy, busy_open
local left = 0
for i = 5, #KEYS do
  local at = 7 + (i - 5) * 3
  local kind, open_max, limit = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local f = redis.call(
    'HMGET', KEYS[i], 'status', 'posted', 'uncommitted', 'held', 'open', 'epoch')
  if f[1] == 'revoked' then return {'revoked', i - 4, 0} end
  if kind ~= 'K' then
    -- What an older epoch said of posted and status may be of a till that lost its last words.
    if not f[2] or f[6] ~= epoch then return {'cold', i - 4, 0} end
    if f[1] == 'frozen' then return {'frozen', i - 4, 0} end
    local spoken_for = tonumber(f[3] or '0') + tonumber(f[4] or '0')
    local available = tonumber(f[2]) - spoken_for
    if kind == 'B' then available = limit - tonumber(f[2]) - spoken_for end
    if available < nanos then return {'short', i - 4, available} end
    if i == 5 then left = available - nanos end
  end
  -- Credit is checked on every scope first: a caller who cannot pay is told so, not to wait.
  local open = tonumber(f[5] or '0')
  if open_max > 0 and open >= open_max and not busy then busy, busy_open = i - 4, open end
end
if busy then return {'busy', busy, busy_open} end

local t = redis.call('TIME')
local lease_ends = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000) + tonumber(ARGV[4])
for i = 5, #KEYS do
  redis.call('HINCRBY', KEYS[i], 'open', 1)
  if ARGV[7 + (i - 5) * 3] ~= 'K' then redis.call('HINCRBY', KEYS[i], 'held', ARGV[3]) end
end
redis.call('HSET', KEYS[3], 'state', 'H', 'nanos', ARGV[3], 'worker', ARGV[5], 'draft', ARGV[6])
redis.call('ZADD', KEYS[4], lease_ends, ARGV[2])
return {'admitted', 0, left}
