-- FETCH: deliver up to `count` waiting entries to a worker, highest priority first, without blocking.
-- KEYS  the queues in the order in which they are served
-- ARGV  1 group, 2 worker, 3 count
-- Gives a list of {queue number from 1, entry, fields}. XREADGROUP's own COUNT is per stream, hence the loop.
local found, room = {}, tonumber(ARGV[3])
for i = 1, #KEYS do
  if room <= 0 then break end
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', room, 'STREAMS', KEYS[i], '>')
  if reply then
    for _, item in ipairs(reply[1][2]) do
      found[#found + 1] = {i, item[1], item[2]}
      room = room - 1
    end
  end
end
return found
