#!lua flags=allow-oom
-- renew: an open request goes on. Its lease, how far it got, and more hold when it asks for more.
-- Absolute values only, so it is safe to repeat and to come late. It keeps what was admitted, so it
-- runs when memory is short, too.
-- KEYS  1 epoch   2 outbox   3 leases   4 hold   5.. scopes
-- ARGV  1 epoch   2 request id   3 lease, ms   4 state (H or F)   5 draft of the receipt ('': as it is)
--       6 hold wanted, nanos (not above what is held: no growth)
--       7 worker that holds it, should the till have lost it or some of it ('': do not place it
--         again); the hold is then what was granted
--       8.. for each scope: kind (A account, B budget, K key), limit in nanos (B only, else 0)
-- Reply {status, nanos held, nanos available to the scope that is short}
--       status: ok, short (no growth), wait (no growth before the till is open and the scope seeded),
--       settled (ended by somebody else: in the outbox), gone (neither hold nor outbox entry)
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then return {'settled', 0, 0} end
local held = redis.call('HGET', KEYS[4], 'nanos')
local wanted = tonumber(ARGV[6])
local t = redis.call('TIME')
local lease_ends = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000) + tonumber(ARGV[3])

if not held then
  if ARGV[7] == '' then return {'gone', 0, 0} end
  -- The till lost it. What was promised is held again whatever else is held by now.
  for i = 5, #KEYS do
    redis.call('HINCRBY', KEYS[i], 'open', 1)
    if ARGV[8 + (i - 5) * 2] ~= 'K' then redis.call('HINCRBY', KEYS[i], 'held', ARGV[6]) end
  end
  redis.call('HSET', KEYS[4], 'state', ARGV[4], 'nanos', ARGV[6], 'worker', ARGV[7], 'draft', ARGV[5])
  redis.call('ZADD', KEYS[3], lease_ends, ARGV[2])
  return {'ok', wanted, 0}
end

redis.call('ZADD', KEYS[3], lease_ends, ARGV[2])
if ARGV[5] ~= '' then redis.call('HSET', KEYS[4], 'draft', ARGV[5]) end
if ARGV[4] == 'F' then redis.call('HSET', KEYS[4], 'state', 'F') end
local more = wanted - tonumber(held)
if more <= 0 then return {'ok', tonumber(held), 0} end

-- Growth that the till lost was promised, too.
local is_new_growth = ARGV[7] == ''
if is_new_growth and redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return {'wait', tonumber(held), 0}
end
for i = 5, is_new_growth and #KEYS or 0 do
  local kind, limit = ARGV[8 + (i - 5) * 2], tonumber(ARGV[9 + (i - 5) * 2])
  if kind ~= 'K' then
    local f = redis.call('HMGET', KEYS[i], 'posted', 'uncommitted', 'held', 'epoch')
    if not f[1] or f[4] ~= ARGV[1] then return {'wait', tonumber(held), 0} end
    local spoken_for = tonumber(f[2] or '0') + tonumber(f[3] or '0')
    local available = tonumber(f[1]) - spoken_for
    if kind == 'B' then available = limit - tonumber(f[1]) - spoken_for end
    if available < more then return {'short', tonumber(held), available} end
  end
end
for i = 5, #KEYS do
  if ARGV[8 + (i - 5) * 2] ~= 'K' then redis.call('HINCRBY', KEYS[i], 'held', more) end
end
redis.call('HSET', KEYS[4], 'nanos', ARGV[6])
return {'ok', wanted, 0}
