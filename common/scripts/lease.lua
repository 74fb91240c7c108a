-- LEASE: a worker takes the request behind an entry that was delivered to it.
-- KEYS  1 request hash, 2 journal, 3 queue of the entry, 4 dead letters, 5 channel
-- ARGV  1 token, 2 worker, 3 entry, 4 group, 5 max_stalled, 6 max_attempts, 7 done_ms, 8 id,
--       9 frame for cancelled, 10 frame for deadline, 11 frame for poison
-- Gives {'OK', body, journal, waited_ms, left_ms} or {reason}: 'GONE', 'STALE', 'DONE', 'HELD', 'CANCELLED', 'EXPIRED', 'DEAD'.
-- The token is the fence: only its holder may append. `stalled` counts workers in a row that told no token; one that leases
-- a request again is still alive, so that counts once.
local m = redis.call('HMGET', KEYS[1], 'state', 'entry', 'cancel', 'deadline', 'stalled', 'leased_at_length', 'body',
  'attempts', 'worker', 'created', 'grace')
local function drop(why)
  redis.call('XACK', KEYS[3], ARGV[4], ARGV[3])
  redis.call('XDEL', KEYS[3], ARGV[3])
  return {why}
end
local function close(state, frame)
  local length = redis.call('RPUSH', KEYS[2], frame)
  redis.call('PUBLISH', KEYS[5], (length - 1) .. ':' .. frame)
  redis.call('HSET', KEYS[1], 'state', state, 'token', '')
  redis.call('PEXPIRE', KEYS[1], ARGV[7])
  redis.call('PEXPIRE', KEYS[2], ARGV[7])
end
local state = m[1]
if not state then return drop('GONE') end
if m[2] ~= ARGV[3] then return drop('STALE') end
if state == 'finished' or state == 'failed' or state == 'cancelled' then return drop('DONE') end
if state == 'running' and m[9] ~= ARGV[2] then return {'HELD'} end   -- a worker may lease again what it lost track of
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if m[3] == '1' then close('cancelled', ARGV[9]); return drop('CANCELLED') end
if now > tonumber(m[4]) then close('failed', ARGV[10]); return drop('EXPIRED') end
local length = redis.call('LLEN', KEYS[2])
local has_told, is_again = length > tonumber(m[6]), m[9] == ARGV[2]
local stalled = has_told and 0 or tonumber(m[5])
if has_told or not is_again then stalled = stalled + 1 end
local attempts = tonumber(m[8]) + 1
if stalled > tonumber(ARGV[5]) or attempts > tonumber(ARGV[6]) then
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', 10000, '*', 'id', ARGV[8], 'attempts', m[8], 'worker', m[9] or '',
    'reason', stalled > tonumber(ARGV[5]) and 'no progress' or 'too many attempts', 'body', m[7])
  close('failed', ARGV[11])
  return drop('DEAD')
end
redis.call('HSET', KEYS[1], 'state', 'running', 'token', ARGV[1], 'worker', ARGV[2], 'stalled', stalled,
  'leased_at_length', length, 'attempts', attempts)
if is_again then redis.call('HDEL', KEYS[1], 'revoked') end   -- counted once already
redis.call('PEXPIRE', KEYS[1], tonumber(m[4]) - now + m[11])
return {'OK', m[7], redis.call('LRANGE', KEYS[2], 0, -1), now - tonumber(m[10]), tonumber(m[4]) - now}
