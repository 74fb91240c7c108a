-- CANCEL_ORPHAN: ask for the end of a running request that nobody watches; its holder ends it with its next STEP.
-- KEYS  1 request hash, 2 watchers
-- ARGV  1 patience_ms: a request so young may not have been watched yet
-- Gives 1, or 0 when it is watched, may run unwatched, or does not run.
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local m = redis.call('HMGET', KEYS[1], 'state', 'on_disconnect', 'created', 'cancel')
if m[1] ~= 'running' or not m[2] or m[2] == 'run' or m[4] == '1' then return 0 end
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) - m[3] < tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'cancel', '1')
return 1
