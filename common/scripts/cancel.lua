-- CANCEL: ask for the end of a request. A queued one ends here, a running one at its holder's next STEP.
-- KEYS  1 request hash, 2 journal, 3 channel
-- ARGV  1 done_ms, 2 frame for cancelled
-- Gives 1, or 0 when there is nothing to cancel. The entry of a queued request stays: LEASE skips it
-- (XDEL of an undelivered entry would spoil the group's lag, which autoscalers read).
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'finished' or state == 'failed' or state == 'cancelled' then return 0 end
redis.call('HSET', KEYS[1], 'cancel', '1')
if state == 'queued' then
  local length = redis.call('RPUSH', KEYS[2], ARGV[2])
  redis.call('PUBLISH', KEYS[3], (length - 1) .. ':' .. ARGV[2])
  redis.call('HSET', KEYS[1], 'state', 'cancelled')
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
end
return 1
