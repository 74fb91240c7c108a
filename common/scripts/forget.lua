-- FORGET: remove an ended request and its journal, so that it can be enqueued again under its id.
-- KEYS  1 request hash, 2 journal
-- Gives 1 when nothing is left of it, 0 when it is queued or running.
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'queued' or state == 'running' then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
