-- ENQUEUE: put a new request on its queue, once for each request id, and note who reads its stream.
-- KEYS  1 request hash, 2 its queue, 3 watchers, 4.. all queues of the model
-- ARGV  1 id, 2 body, 3 group, 4 max_waiting, 5 deadline_ms, 6 grace_ms, 7 prompt_tokens, 8 max_new_tokens, 9 tenant,
--       10 on_disconnect, 11 watcher or '', 12 watch_ms
-- Gives {'OK', entry, waiting} | {'DUPLICATE', state} | {'FULL', waiting}
local function watch()
  if ARGV[11] == '' then return end
  redis.call('SADD', KEYS[3], ARGV[11])
  redis.call('PEXPIRE', KEYS[3], ARGV[12])
end
local state = redis.call('HGET', KEYS[1], 'state')
if state then watch() return {'DUPLICATE', state} end
local waiting = 0
for i = 4, #KEYS do
  local length = redis.call('XLEN', KEYS[i])
  if length > 0 then
    local pending = redis.pcall('XPENDING', KEYS[i], ARGV[3])   -- an error: no worker has made the group yet
    waiting = waiting + length - (pending.err and 0 or pending[1])
  end
end
if waiting >= tonumber(ARGV[4]) then return {'FULL', waiting} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local entry = redis.call('XADD', KEYS[2], '*', 'id', ARGV[1], 'prompt_tokens', ARGV[7],
  'max_new_tokens', ARGV[8], 'tenant', ARGV[9], 'enqueued_at', time[1])
redis.call('HSET', KEYS[1], 'state', 'queued', 'entry', entry, 'queue', KEYS[2], 'body', ARGV[2], 'created', now,
  'deadline', now + ARGV[5], 'grace', ARGV[6], 'token', '', 'attempts', 0, 'stalled', 0, 'leased_at_length', 0, 'on_disconnect', ARGV[10])
redis.call('PEXPIRE', KEYS[1], ARGV[5] + ARGV[6])
watch()
return {'OK', entry, waiting}
