-- REVOKE: take a request from a worker whose heartbeat is gone; it goes to the front.
-- KEYS  1 request hash, 2 queue of the entry, 3 resume queue, 4 heartbeat of the owner
-- ARGV  1 entry, 2 owner, 3 group, 4 id
-- Gives 1 requeued, 2 entry removed (nothing to run), 0 the owner lives or holds it no longer.
-- XACK comes before XADD so that a full Redis does not refuse the XADD.
if redis.call('EXISTS', KEYS[4]) == 1 then return 0 end
local pending = redis.call('XPENDING', KEYS[2], ARGV[3], ARGV[1], ARGV[1], 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then return 0 end
local m = redis.call('HMGET', KEYS[1], 'state', 'entry')
redis.call('XACK', KEYS[2], ARGV[3], ARGV[1])
redis.call('XDEL', KEYS[2], ARGV[1])
if not m[1] or m[2] ~= ARGV[1] or m[1] == 'finished' or m[1] == 'failed' or m[1] == 'cancelled' then return 2 end
local entry = redis.call('XADD', KEYS[3], '*', 'id', ARGV[4])
redis.call('HSET', KEYS[1], 'state', 'queued', 'token', '', 'entry', entry, 'queue', KEYS[3])
return 1
