-- SETTLE: a request of an API key has ended and used tokens. Counts once for each request that is open.
-- KEYS  1 open requests, 2 budget
-- ARGV  1 id, 2 tokens used, 3 tokens a minute or 0
-- Gives 1, or 0 when the request is not open any more
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
local used, per_minute = tonumber(ARGV[2]), tonumber(ARGV[3])
if per_minute == 0 or used == 0 then return 1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local budget = redis.call('HMGET', KEYS[2], 'tokens', 'at')
local tokens = per_minute
if budget[1] then tokens = math.min(per_minute, budget[1] + (now - budget[2]) * per_minute / 60000) end
tokens = tokens - used
redis.call('HSET', KEYS[2], 'tokens', string.format('%.3f', tokens), 'at', now)
redis.call('PEXPIRE', KEYS[2], math.ceil((per_minute - tokens) * 60000 / per_minute))   -- full again: as if it never was
return 1
