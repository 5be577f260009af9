#!lua
-- admit: place one hold on every scope of a request, or on none. Idempotent on the request id.
-- KEYS  1 epoch   2 outbox   3 hold   4 leases   5.. scopes
-- ARGV  1 epoch   2 request id   3 hold, nanos   4 lease, ms   5 worker   6 draft of the receipt
--       7.. for each scope: kind (A account, B budget, K key), open requests at most (0: no limit),
--       limit in nanos (B only, else 0)
--       then, only when some scope has a limit per minute: tokens that the request may take, and
--       for each scope: requests per minute, tokens per minute (0: no limit)
-- Reply {status, scope index, available nanos or open requests or ms to wait, standing}
--       status: admitted, exists, lost (no epoch: what was here is gone), epoch (of another one),
--       cold (this scope was not seeded in this epoch), frozen, revoked, short,
--       requests, tokens (more than its limit per minute allows now), busy
--       standing, only with limits per minute: limit, remaining, ms until all of it remains; of the
--       requests, then of the tokens, of the scope with the fewest remaining (limit 0: no limit)
-- No key here has a time to live: a hold that vanished by itself would mint credit.
local epoch = redis.call('GET', KEYS[1])
if not epoch then return {'lost', 0, 0} end
if epoch ~= ARGV[1] then return {'epoch', 0, 0} end
local at_rates = 7 + (#KEYS - 4) * 3
local tokens = ARGV[at_rates]
if redis.call('EXISTS', KEYS[3]) == 1 or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then
  return {'exists', 0, 0, tokens and redis.call('HGET', KEYS[3], 'standing')}
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
local t = redis.call('TIME')

-- Token buckets of one minute, which refill evenly (GCRA). `rq` and `tk` of a scope: the moment at
-- which its bucket of requests or tokens is full again, in microseconds, and in `rqf` and `tkf`
-- parts of one, `limit` of which are a whole: so no limit is ever rounded.
local writes, standing
if tokens then
  local minute, now = 60000000, tonumber(t[1]) * 1000000 + tonumber(t[2])
  local names = {'requests', 'rq', 'rqf', 'tokens', 'tk', 'tkf'}
  local wanted, buckets, refused = {1, tonumber(tokens)}, {}, nil
  writes = {}
  for i = 5, #KEYS do
    local f = redis.call('HMGET', KEYS[i], 'rq', 'rqf', 'tk', 'tkf')
    local write = {KEYS[i]}
    for j = 1, 2 do
      local limit = tonumber(ARGV[at_rates + 2 * (i - 5) + j])
      if limit > 0 then
        local ahead, full, used = tonumber(f[2 * j - 1] or '0') - now, minute * limit, 0
        -- More than a minute ahead is of another clock: nobody is to be locked out by that.
        if ahead <= minute then
          used = math.max(math.min(ahead * limit + tonumber(f[2 * j] or '0'), full), 0)
        end
        -- Whoever wants more than there ever is gets all of it.
        local after = used + math.min(wanted[j], limit) * minute
        local wait = after > full and math.ceil((after - full) / (limit * 1000))
        if wait and (not refused or wait > refused[3]) then
          refused = {names[3 * j - 2], i - 4, wait}
        end
        buckets[#buckets + 1] = {j, limit, full, used, after}
        local ends, n = math.floor(after / limit), #write
        write[n + 1], write[n + 2] = names[3 * j - 1], string.format('%.0f', now + ends)
        write[n + 3], write[n + 4] = names[3 * j], after - ends * limit
      end
    end
    if #write > 1 then writes[#writes + 1] = write end
  end
  local tight = {0, 0, 0, 0, 0, 0}
  for _, b in ipairs(buckets) do
    local at, limit, used = 3 * b[1] - 2, b[2], refused and b[4] or b[5]
    local remaining = math.floor((b[3] - used) / minute)
    if tight[at] == 0 or remaining < tight[at + 1] then
      tight[at], tight[at + 1] = limit, remaining
      tight[at + 2] = math.ceil(used / (limit * 1000))
    end
  end
  standing = table.concat(tight, ' ')
  if refused then
    refused[4] = standing
    return refused
  end
end
if busy then return {'busy', busy, busy_open} end

local lease_ends = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000) + tonumber(ARGV[4])
for i = 5, #KEYS do
  redis.call('HINCRBY', KEYS[i], 'open', 1)
  if ARGV[7 + (i - 5) * 3] ~= 'K' then redis.call('HINCRBY', KEYS[i], 'held', ARGV[3]) end
end
redis.call('HSET', KEYS[3], 'state', 'H', 'nanos', ARGV[3], 'worker', ARGV[5], 'draft', ARGV[6])
redis.call('ZADD', KEYS[4], lease_ends, ARGV[2])
if not tokens then return {'admitted', 0, left} end

-- For `settle`, which puts the tokens right: what was asked for, and each scope's limit.
local taken = {tokens}
for i = 5, #KEYS do taken[#taken + 1] = ARGV[at_rates + 2 * (i - 5) + 2] end
redis.call('HSET', KEYS[3], 'tokens', table.concat(taken, ' '), 'standing', standing)
for _, write in ipairs(writes) do redis.call('HSET', unpack(write)) end
return {'admitted', 0, left, standing}
