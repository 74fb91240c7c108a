-- RELEASE: a worker that stops hands a request back; it goes to the front and costs no attempt.
-- KEYS  1 request hash, 2 queue of the entry, 3 resume queue
-- ARGV  1 token, 2 group, 3 id
-- Gives 1, or 0 when the caller no longer holds it.
local m = redis.call('HMGET', KEYS[1], 'token', 'entry', 'stalled', 'attempts')
if m[1] ~= ARGV[1] or ARGV[1] == '' then return 0 end
redis.call('XACK', KEYS[2], ARGV[2], m[2])
redis.call('XDEL', KEYS[2], m[2])
local entry = redis.call('XADD', KEYS[3], '*', 'id', ARGV[3])
redis.call('HSET', KEYS[1], 'state', 'queued', 'token', '', 'entry', entry, 'queue', KEYS[3], 'worker', '',
  'stalled', math.max(tonumber(m[3]) - 1, 0), 'attempts', math.max(tonumber(m[4]) - 1, 0))
return 1
