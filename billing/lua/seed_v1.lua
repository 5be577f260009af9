#!lua
-- seed: tell a scope what the book says. Idempotent: only a newer version changes anything.
-- KEYS  1 epoch   2 scope
-- ARGV  1 epoch   2 posted, nanos   3 version   4 status of the account ('' : no word about it)
-- Reply seeded, kept (not newer) or epoch (the till's content is of another epoch)
local epoch = redis.call('GET', KEYS[1])
if epoch and epoch ~= ARGV[1] then return 'epoch' end
local current = redis.call('HGET', KEYS[2], 'version')
if not epoch then redis.call('SET', KEYS[1], ARGV[1]) end
if current and tonumber(ARGV[3]) < tonumber(current) then return 'kept' end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[2], 'status', ARGV[4]) end
if current and tonumber(ARGV[3]) == tonumber(current) then return 'kept' end
redis.call('HSET', KEYS[2], 'posted', ARGV[2], 'version', ARGV[3])
return 'seeded'
