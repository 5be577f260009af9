#!lua
-- rate: take some of what may happen in a window of time, or nothing. Refills evenly (GCRA).
-- KEYS  1 bucket: when it is full again, microseconds
-- ARGV  1 limit in a window   2 window, seconds   3 how many to take (at most the limit)
-- Reply {taken (1 or 0), ms until so many can be taken}
-- The bucket vanishes when it is full: that is what no bucket means. It holds no money.
local limit, window, cost = tonumber(ARGV[1]), tonumber(ARGV[2]) * 1000000, tonumber(ARGV[3])
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000000 + tonumber(t[2])
local full_at = tonumber(redis.call('GET', KEYS[1]) or '0')
-- What is further ahead than a window is of another clock.
if full_at < now or full_at > now + window then full_at = now end
local after = full_at + math.floor(cost * window / limit)
local wait = math.ceil((after - now - window) / 1000)
if wait > 0 then return {0, wait} end
local live_ms = math.max(math.ceil((after - now) / 1000), 1)
redis.call('SET', KEYS[1], string.format('%.0f', after), 'PX', live_ms)
return {1, 0}
