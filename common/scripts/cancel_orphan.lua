-- CANCEL_ORPHAN: end a request that nobody watches. A queued one ends here, a running one at its holder's next STEP.
-- KEYS  1 request hash, 2 watchers, 3 journal, 4 channel
-- ARGV  1 patience_ms: a request so young may not have been watched yet, 2 whether it was unwatched at the last look too,
--       3 done_ms, 4 frame for cancelled
-- Gives 0 it is watched, may run unwatched, or has ended; 1 nobody watches it; 2 and it was ended for that.
-- Two looks, because a clock that is set forward ends the watchers' set before they can renew it.
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local m = redis.call('HMGET', KEYS[1], 'state', 'on_disconnect', 'created', 'cancel')
if (m[1] ~= 'running' and m[1] ~= 'queued') or not m[2] or m[2] == 'run' or m[4] == '1' then return 0 end
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) - m[3] < tonumber(ARGV[1]) then return 0 end
if ARGV[2] ~= '1' then return 1 end
redis.call('HSET', KEYS[1], 'cancel', '1')
if m[1] == 'queued' then
  local length = redis.call('RPUSH', KEYS[3], ARGV[4])
  redis.call('PUBLISH', KEYS[4], (length - 1) .. ':' .. ARGV[4])
  redis.call('HSET', KEYS[1], 'state', 'cancelled')
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
return 2
