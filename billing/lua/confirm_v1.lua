#!lua flags=allow-oom
-- confirm: the book committed these receipts; take over what it says now.
-- Absolute state with a version, never a delta: late, lost and repeated calls do no harm.
-- KEYS  1 outbox   2 leases   3..2+n scopes   then one hold for each receipt
-- ARGV  1 n   then for each scope: kind, posted nanos, version ('' '': the book said nothing)
--       then for each receipt: request id, indexes of its scopes ("1,2")
-- It frees memory, so it runs when memory is short. A request id given twice counts once.
-- Reply number of outbox entries dropped
local n = tonumber(ARGV[1])
local entries, seen = {}, {}
local at = 2 + 3 * n
local hold = 2 + n
-- Read and check everything first: a script that fails half way is not rolled back.
while ARGV[at] do
  hold = hold + 1
  local value = redis.call('HGET', KEYS[1], ARGV[at])
  local price = 0
  if value then
    price = tonumber(string.match(value, '^(%d+) '))
    if not price then return redis.error_reply('OUTBOX entry without a price') end
  end
  local held = redis.call('HGET', KEYS[hold], 'nanos')
  if not seen[ARGV[at]] then
    seen[ARGV[at]] = true
    entries[#entries + 1] =
      {ARGV[at], ARGV[at + 1], KEYS[hold], value and price, held and tonumber(held)}
  end
  at = at + 2
end

local dropped = 0
for _, e in ipairs(entries) do
  local id, scopes, hold_key, price, held = e[1], e[2], e[3], e[4], e[5]
  for index in string.gmatch(scopes, '%d+') do
    local i = tonumber(index)
    local key, kind = KEYS[2 + i], ARGV[2 + (i - 1) * 3]
    if held then redis.call('HINCRBY', key, 'open', -1) end
    if kind ~= 'K' then
      if price then redis.call('HINCRBY', key, 'uncommitted', 0 - price) end
      if held then redis.call('HINCRBY', key, 'held', 0 - held) end
    end
  end
  if price then dropped = dropped + redis.call('HDEL', KEYS[1], id) end
  -- A hold is still here when its settle was lost on the way: the receipt ends it.
  if held then
    redis.call('DEL', hold_key)
    redis.call('ZREM', KEYS[2], id)
  end
end

for i = 1, n do
  local posted, version = ARGV[3 + (i - 1) * 3], ARGV[4 + (i - 1) * 3]
  if version ~= '' then
    local current = redis.call('HGET', KEYS[2 + i], 'version')
    if not current or tonumber(version) > tonumber(current) then
      redis.call('HSET', KEYS[2 + i], 'posted', posted, 'version', version)
    end
  end
end
return dropped
