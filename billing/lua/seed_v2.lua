#!lua
-- seed: tell a scope what the book says. Idempotent: only a newer version changes anything.
-- KEYS  1 epoch   2 scope
-- ARGV  1 epoch   2 posted, nanos   3 version   4 status of the account ('' : no word about it)
-- Reply seeded, kept (not newer) or epoch (the till is not open in this epoch: nothing is written)
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'epoch' end
local f = redis.call('HMGET', KEYS[2], 'version', 'epoch')
-- A confirm may have told more than this reading of the book knew, also in an older epoch. It says
-- nothing of the status, and what an older epoch said of that may be old: the first seed tells it.
local newer = f[1] and tonumber(f[1]) - tonumber(ARGV[3]) or -1
redis.call('HSET', KEYS[2], 'epoch', ARGV[1])
if ARGV[4] ~= '' and (newer <= 0 or f[2] ~= ARGV[1]) then
  redis.call('HSET', KEYS[2], 'status', ARGV[4])
end
if newer >= 0 then return 'kept' end
redis.call('HSET', KEYS[2], 'posted', ARGV[2], 'version', ARGV[3])
return 'seeded'
