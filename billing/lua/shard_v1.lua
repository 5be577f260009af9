#!lua
-- shard: open a shard for new holds in an epoch, or close it to those of older ones.
-- KEYS  1 epoch
-- ARGV  1 epoch   2 open or close
-- Reply 1 when something changed. A shard that is open in a newer epoch stays as it is.
local current = redis.call('GET', KEYS[1])
if current and tonumber(current) >= tonumber(ARGV[1]) then return 0 end
if ARGV[2] == 'open' then
  redis.call('SET', KEYS[1], ARGV[1])
  return 1
end
return redis.call('DEL', KEYS[1])
