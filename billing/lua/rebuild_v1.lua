#!lua flags=allow-oom
-- rebuild: make the scopes of a shard what its holds and outbox say, and forget what the book said.
-- Nothing is written unless holds, leases and outbox are as they were read: a change answers
-- `changed`, and the shard is read again. What cannot be read is kept under other names.
-- KEYS  1 outbox   2 leases   3 where odd outbox entries are kept
--       4.. scopes   then holds   then for each odd key: it, its new name
-- ARGV  1 number of scopes   2 of holds   3 of odd keys   4 of outbox entries   5 of odd ones
--       6 prefix of the keys of holds
--       then for each scope: kind (A account, B budget, K key), held, uncommitted (nanos), open
--       for each hold: request id, nanos   for each outbox entry, odd ones last: its field
-- Reply {mended, scopes that were wrong} or {changed, what}
local scopes, holds, odd = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local entries, odd_entries, prefix = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local first_hold, first_odd = 4 + scopes, 4 + scopes + holds
local at_holds = 7 + 4 * scopes
local at_entries = at_holds + 2 * holds

local function of_type(key, wanted)
  local found = redis.call('TYPE', key)['ok']
  return found == wanted
end

-- Read and check everything first: a script that fails half way is not rolled back.
local known, moved = {}, {}
for i = 0, holds - 1 do
  local id = ARGV[at_holds + 2 * i]
  local key = KEYS[first_hold + i]
  if not of_type(key, 'hash') or redis.call('HGET', key, 'nanos') ~= ARGV[at_holds + 2 * i + 1] then
    return {'changed', 'hold'}
  end
  known[id] = true
end
for i = 0, odd - 1 do
  local key = KEYS[first_odd + 2 * i]
  if redis.call('EXISTS', key) == 0 then return {'changed', 'odd key'} end
  moved[key] = true
end
local there = of_type(KEYS[1], 'hash') and redis.call('HLEN', KEYS[1]) or 0
if there ~= entries then return {'changed', 'outbox'} end
for i = 0, entries - 1 do
  if redis.call('HEXISTS', KEYS[1], ARGV[at_entries + i]) == 0 then return {'changed', 'outbox'} end
end
local strays = {}
if of_type(KEYS[2], 'zset') then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if not known[id] then
      local key = prefix .. id -- not money
      if not moved[key] and redis.call('EXISTS', key) == 1 then return {'changed', 'new hold'} end
      strays[#strays + 1] = id
    end
  end
end

for i = 0, odd - 1 do
  redis.call('RENAME', KEYS[first_odd + 2 * i], KEYS[first_odd + 2 * i + 1])
end
for i = entries - odd_entries, entries - 1 do
  local field = ARGV[at_entries + i]
  redis.call('HSET', KEYS[3], field, redis.call('HGET', KEYS[1], field))
  redis.call('HDEL', KEYS[1], field)
end
for _, id in ipairs(strays) do redis.call('ZREM', KEYS[2], id) end
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
-- Without a lease no sweeper would ever find it.
for i = 0, holds - 1 do redis.call('ZADD', KEYS[2], 'NX', now, ARGV[at_holds + 2 * i]) end

local wrong = 0
for i = 0, scopes - 1 do
  local key, at = KEYS[4 + i], 7 + 4 * i
  local held, uncommitted, open = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local f = redis.call('HMGET', key, 'held', 'uncommitted', 'open', 'status')
  if (f[1] or '0') ~= held or (f[2] or '0') ~= uncommitted or (f[3] or '0') ~= open then
    wrong = wrong + 1
  end
  local expires = redis.call('EXPIRETIME', key) -- of a budget's window, see seed
  redis.call('DEL', key)
  if held ~= '0' or uncommitted ~= '0' or open ~= '0' then
    redis.call('HSET', key, 'held', held, 'uncommitted', uncommitted, 'open', open)
    if expires > 0 then redis.call('EXPIREAT', key, expires) end
  end
  -- The book is asked for an account's status; nobody is asked for a key's.
  if ARGV[at] == 'K' and f[4] == 'revoked' then redis.call('HSET', key, 'status', 'revoked') end
end
return {'mended', wrong}
