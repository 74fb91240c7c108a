-- REVOKE: take a request from a worker whose heartbeat is gone; it goes to the front.
-- KEYS  1 request hash, 2 queue of the entry, 3 resume queue, 4 heartbeat of the owner, 5 journal
-- ARGV  1 entry, 2 owner, 3 group, 4 id
-- Gives 1 requeued, 2 entry removed (nothing to run), 0 the owner lives or holds it no longer.
-- A heartbeat that would last longer than the lease, its value, was written before the clock was set back: it gets one
-- lease from now on, in which its worker beats again if it lives.
-- XACK comes before XADD so that a full Redis does not refuse the XADD.
-- A request that brought no token is a suspect: it may be what ended its worker, so the next one tries it alone.
-- `revoked` is the token that lost the request: its holder clears the request of that suspicion if it lives (STEP).
local left = redis.call('PTTL', KEYS[4])
if left > 0 then
  local lease = tonumber(redis.call('GET', KEYS[4]))
  if left > lease then redis.call('PEXPIRE', KEYS[4], lease) end
  return 0
end
local pending = redis.call('XPENDING', KEYS[2], ARGV[3], ARGV[1], ARGV[1], 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then return 0 end
local m = redis.call('HMGET', KEYS[1], 'state', 'entry', 'leased_at_length', 'stalled', 'token')
redis.call('XACK', KEYS[2], ARGV[3], ARGV[1])
redis.call('XDEL', KEYS[2], ARGV[1])
if not m[1] or m[2] ~= ARGV[1] or m[1] == 'finished' or m[1] == 'failed' or m[1] == 'cancelled' then return 2 end
local has_told = m[1] == 'running' and redis.call('LLEN', KEYS[5]) > tonumber(m[3])
local is_suspect = tonumber(m[4]) > 0 and not has_told
local entry = redis.call('XADD', KEYS[3], '*', 'id', ARGV[4], 'suspect', is_suspect and '1' or '0')
redis.call('HSET', KEYS[1], 'state', 'queued', 'token', '', 'entry', entry, 'queue', KEYS[3], 'revoked', m[5])
return 1
