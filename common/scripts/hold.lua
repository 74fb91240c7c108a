-- HOLD: requests of an API key are still open; those that a gateway left behind run out.
-- KEYS  1 open requests
-- ARGV  1 hold_ms, 2.. ids
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
