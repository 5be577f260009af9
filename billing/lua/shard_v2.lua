#!lua
-- shard: close a shard for a new epoch, or open it for new holds. Safe to come late.
-- The epoch's key holds the number while the shard is open, its negative while it is closed for it.
-- Only what was closed for an epoch is opened in it: nobody who is late opens an older one, and
-- nobody takes an emptied shard for a new one.
-- KEYS  1 epoch
-- ARGV  1 epoch   2 open or close
-- Reply open, closed, newer (known in a newer epoch: nothing is done)
--       or lost (to be opened, but not closed for this epoch, or emptied since: nothing is done)
local current, epoch = tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])
if math.abs(current) > epoch then return 'newer' end
if current == epoch then return 'open' end
if ARGV[2] == 'close' then
  redis.call('SET', KEYS[1], '-' .. ARGV[1]) -- not money
  return 'closed'
end
if current ~= 0 - epoch then return 'lost' end
redis.call('SET', KEYS[1], ARGV[1])
return 'open'
