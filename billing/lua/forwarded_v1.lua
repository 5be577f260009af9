#!lua
-- forwarded: the request is about to be written to a provider, so it may cost something.
-- KEYS  1 hold
-- ARGV  none
-- Reply 1 when the hold is there, else 0. Safe to repeat: it only sets a state.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'state', 'F')
return 1
