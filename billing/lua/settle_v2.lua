#!lua flags=allow-oom
-- settle: end one hold with its real price and put the receipt into the outbox.
-- Idempotent on the request id while it is in the outbox; after `confirm` the book refuses it.
-- It ends what was admitted, so it runs when memory is short, too.
-- KEYS  1 outbox   2 hold   3 leases   4.. scopes
-- ARGV  1 request id   2 price, nanos   3 outbox entry: "<price> <receipt>"   4.. kind of each scope
--       then T, when some scope has a limit of tokens per minute: what `admit` took too much or too
--       little is put right by the receipt
-- Reply {status, available nanos of the account}
--       status: settled, exists, unknown (no such hold: the till lost it; the price counts all the same)
local function available()
  local f = redis.call('HMGET', KEYS[4], 'posted', 'uncommitted', 'held')
  return tonumber(f[1] or '0') - tonumber(f[2] or '0') - tonumber(f[3] or '0')
end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return {'exists', available()} end

local price = tonumber(ARGV[2])
local held = redis.call('HGET', KEYS[2], 'nanos')
local status = held and 'settled' or 'unknown'
local held_nanos = tonumber(held or '0')
if held and price > held_nanos then return redis.error_reply('PRICE above the hold') end

-- Of a lost hold nobody knows what was taken for it; and what is here again is not put right again.
local tokens = held and ARGV[#KEYS + 1] == 'T' and redis.call('HGET', KEYS[2], 'tokens')
if tokens then
  local minute, t = 60000000, redis.call('TIME')
  local now = tonumber(t[1]) * 1000000 + tonumber(t[2])
  -- Quotes in a text of the receipt are escaped, so these are its own fields; one of 0 is left out.
  local used = tonumber(string.match(ARGV[3], '"input_tokens":(%d+)') or '0')
    + tonumber(string.match(ARGV[3], '"output_tokens":(%d+)') or '0')
  local taken, i = nil, 3
  for number in string.gmatch(tokens, '%d+') do
    local limit = tonumber(number)
    if taken and limit > 0 and KEYS[i] then
      local full_at = tonumber(redis.call('HGET', KEYS[i], 'tk') or '0')
      if full_at < now or full_at > now + minute then full_at = now end
      full_at = full_at + math.floor((used - math.min(taken, limit)) * minute / limit)
      -- However much it was, a minute later the bucket is full.
      redis.call('HSET', KEYS[i], 'tk', string.format('%.0f', math.min(full_at, now + minute)))
    end
    taken, i = taken or limit, i + 1
  end
end

for i = 4, #KEYS do
  if held then redis.call('HINCRBY', KEYS[i], 'open', -1) end
  if ARGV[i] ~= 'K' then
    redis.call('HINCRBY', KEYS[i], 'held', 0 - held_nanos)
    redis.call('HINCRBY', KEYS[i], 'uncommitted', price)
  end
end
if held then
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return {status, available()}
