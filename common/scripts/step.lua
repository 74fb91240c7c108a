-- STEP: append one frame to each of many journals and publish it, if the caller still holds the request.
-- KEYS  (request hash, journal, queue of the entry, channel) for each request
-- ARGV  1 group, 2 done_ms, 3 frame for cancelled, then (token, base, kind, frame) for each request
--       kind: 'append' | 'finished' | 'failed' (the frame is the last) | 'touch' (no frame: only ask who holds it)
-- Gives for each request
--   n >= 0          the journal's new length
--   -1              fenced: somebody else holds it, or nobody
--   -2              cancelled: the terminal frame is written
--   -1000000 - n    the journal is behind (Redis rolled back): send again from n
--   list of frames  the journal is ahead (a reply was lost, or a gateway seeded it): these are at `base` and after
-- Runs once for every token that the fleet generates, so the usual case is three commands: it appends first, and takes the
-- frame back when the journal was not as long as the caller thought. Nobody sees that, because a script is atomic.
local call, KEYS, ARGV = redis.call, KEYS, ARGV
local out = {}

local function close(request, journal, queue, kind, token)
  call('HSET', request, 'state', kind, 'token', '', 'final_token', token)
  call('PEXPIRE', request, ARGV[2])
  call('PEXPIRE', journal, ARGV[2])
  local entry = call('HGET', request, 'entry')
  call('XACK', queue, ARGV[1], entry)
  call('XDEL', queue, entry)
end

local function expire_with(request, journal)
  local m, time = call('HMGET', request, 'deadline', 'grace'), call('TIME')
  call('PEXPIRE', journal, math.max(m[1] - time[1] * 1000 - math.floor(time[2] / 1000), 0) + m[2])
end

local function differs(length, base, journal)
  if length > base then return call('LRANGE', journal, base, -1) end
  if length < base then return -1000000 - length end
end

local function fenced(request, journal, kind, base, token)
  -- a worker that outlives its lease was not ended by the request: that lease counts for nothing
  local m = call('HMGET', request, 'revoked', 'stalled', 'attempts')
  if m[1] == token then
    call('HSET', request, 'revoked', '', 'stalled', math.max(m[2] - 1, 0), 'attempts', math.max(m[3] - 1, 0))
  end
  -- the retry of the very frame that ended the request is no fault
  local is_end = kind == 'finished' or kind == 'failed'
  local length = call('LLEN', journal)
  return is_end and length == base + 1 and call('HGET', request, 'final_token') == token and length or -1
end

for i = 0, #KEYS / 4 - 1 do
  local request, journal, at = KEYS[4 * i + 1], KEYS[4 * i + 2], 4 * i + 4
  local token, base, kind, frame = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local m = call('HMGET', request, 'token', 'cancel')
  local is_cancelled = m[2] == '1'
  if is_cancelled then kind, frame = 'cancelled', ARGV[3] end
  local place = tonumber(base)
  if m[1] ~= token then out[i + 1] = fenced(request, journal, ARGV[at + 2], place, token)
  elseif kind == 'touch' then
    local length = call('LLEN', journal)
    out[i + 1] = differs(length, place, journal) or length
  else
    local length = call('RPUSH', journal, frame)
    if length ~= place + 1 then
      call('RPOP', journal)
      out[i + 1] = differs(length - 1, place, journal)
    else
      if length == 1 then expire_with(request, journal) end
      call('PUBLISH', KEYS[4 * i + 4], base .. ':' .. frame)
      if kind ~= 'append' then close(request, journal, KEYS[4 * i + 3], kind, token) end
      out[i + 1] = is_cancelled and -2 or length
    end
  end
end
return out
