#!lua flags=allow-oom
-- sweep: end a hold that nobody renews, with a price made from what its worker last wrote down.
-- The same as `settle`, but only while the hold is as the sweeper saw it and its lease is long over.
-- KEYS  1 outbox   2 hold   3 leases   4.. scopes
-- ARGV  1 request id   2 how long a lease must be over, ms   3 state that was seen
--       4 price, nanos   5 outbox entry: "<price> <receipt>"   6.. kind of each scope
-- Reply swept, exists (in the outbox already), gone (no such hold), leased, changed (forwarded since)
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 'exists' end
local f = redis.call('HMGET', KEYS[2], 'nanos', 'state')
if not f[1] then
  redis.call('ZREM', KEYS[3], ARGV[1])
  return 'gone'
end
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
-- Every renewal moves the lease, so with the lease the draft is the one that was seen, too.
local lease = redis.call('ZSCORE', KEYS[3], ARGV[1])
if lease and tonumber(lease) + tonumber(ARGV[2]) > now then return 'leased' end
if f[2] ~= ARGV[3] then return 'changed' end
local held, price = tonumber(f[1]), tonumber(ARGV[4])
if price > held then return redis.error_reply('PRICE above the hold') end

for i = 4, #KEYS do
  redis.call('HINCRBY', KEYS[i], 'open', -1)
  if ARGV[2 + i] ~= 'K' then
    redis.call('HINCRBY', KEYS[i], 'held', 0 - held)
    redis.call('HINCRBY', KEYS[i], 'uncommitted', ARGV[4])
  end
end
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[5])
return 'swept'
