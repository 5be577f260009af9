#!lua
-- seed: tell a scope what the book says. Idempotent: only a newer version changes anything.
-- KEYS  1 epoch   2 scope
-- ARGV  1 epoch   2 posted, nanos   3 version   4 status of the account ('' : no word about it)
--       5 when the window of a budget ends, seconds since 1970 (0: never; '' : an account)
-- Reply seeded, kept (not newer) or epoch (the till is not open in this epoch: nothing is written)
-- A budget's window is forgotten 35 days after its end, and not before 35 days from now: nobody is
-- admitted on it by then, or it would have been seeded again, as every few seconds while its key is
-- in use; and what was open has ended. No other key may have a time to live: an account or a hold
-- that vanished by itself would mint credit.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'epoch' end
local f = redis.call('HMGET', KEYS[2], 'version', 'epoch')
-- A confirm may have told more than this reading of the book knew, also in an older epoch. It says
-- nothing of the status, and what an older epoch said of that may be old: the first seed tells it.
local newer = f[1] and tonumber(f[1]) - tonumber(ARGV[3]) or -1
redis.call('HSET', KEYS[2], 'epoch', ARGV[1])
if ARGV[5] ~= '' then
  local now = tonumber(redis.call('TIME')[1])
  redis.call('EXPIREAT', KEYS[2], math.max(tonumber(ARGV[5]), now) + 35 * 86400)
end
if ARGV[4] ~= '' and (newer <= 0 or f[2] ~= ARGV[1]) then
  redis.call('HSET', KEYS[2], 'status', ARGV[4])
end
if newer >= 0 then return 'kept' end
redis.call('HSET', KEYS[2], 'posted', ARGV[2], 'version', ARGV[3])
return 'seeded'
