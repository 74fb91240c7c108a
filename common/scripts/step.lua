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
local out = {}
for i = 0, #KEYS / 4 - 1 do
  local request, journal, queue, channel = KEYS[4 * i + 1], KEYS[4 * i + 2], KEYS[4 * i + 3], KEYS[4 * i + 4]
  local token, base, kind, frame = ARGV[4 * i + 4], tonumber(ARGV[4 * i + 5]), ARGV[4 * i + 6], ARGV[4 * i + 7]
  local m = redis.call('HMGET', request, 'token', 'cancel', 'entry', 'deadline', 'grace')
  local length = redis.call('LLEN', journal)
  if m[1] ~= token then
    -- the retry of the very frame that ended the request is no fault
    local is_retry = (kind == 'finished' or kind == 'failed') and length == base + 1
      and redis.call('HGET', request, 'final_token') == token
    out[i + 1] = is_retry and length or -1
  elseif length > base then out[i + 1] = redis.call('LRANGE', journal, base, -1)
  elseif length < base then out[i + 1] = -1000000 - length
  elseif kind == 'touch' and m[2] ~= '1' then out[i + 1] = length
  else
    local is_cancelled = m[2] == '1'
    if is_cancelled then kind = 'cancelled'; frame = ARGV[3] end
    length = redis.call('RPUSH', journal, frame)
    if length == 1 then
      local time = redis.call('TIME')
      redis.call('PEXPIRE', journal, math.max(m[4] - time[1] * 1000 - math.floor(time[2] / 1000), 0) + m[5])
    end
    redis.call('PUBLISH', channel, base .. ':' .. frame)
    if kind ~= 'append' then
      redis.call('HSET', request, 'state', kind, 'token', '', 'final_token', token)
      redis.call('PEXPIRE', request, ARGV[2])
      redis.call('PEXPIRE', journal, ARGV[2])
      redis.call('XACK', queue, ARGV[1], m[3])
      redis.call('XDEL', queue, m[3])
    end
    out[i + 1] = is_cancelled and -2 or length
  end
end
return out
