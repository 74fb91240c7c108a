-- RESEED: a gateway puts back the frames that it has relayed, because the journal has fewer (Redis was wiped or rolled back).
-- KEYS  1 request hash, 2 journal, 3 channel
-- ARGV  1 keep_ms, then the frames from the first on
-- Gives the journal's length, or
--   -1  the journal goes on otherwise than the frames: what was sent can not be continued
--   -2  the request has ended with fewer frames than these
-- The hash may be gone as well: the caller enqueues the request after this, so that whoever leases it finds the frames.
-- Bytes 5 to 12 of a frame are its chain hash (`common.codec.encode_frame`), which stands for it and all before it.
local function chain(frame) return string.sub(frame, 5, 12) end
local state = redis.call('HGET', KEYS[1], 'state')
local length, given = redis.call('LLEN', KEYS[2]), #ARGV - 1
local shared = math.min(length, given)
if shared > 0 and chain(redis.call('LINDEX', KEYS[2], shared - 1)) ~= chain(ARGV[shared + 1]) then return -1 end
if length >= given then return length end
if state == 'finished' or state == 'failed' or state == 'cancelled' then return -2 end
for i = length + 1, given do
  redis.call('RPUSH', KEYS[2], ARGV[i + 1])
  redis.call('PUBLISH', KEYS[3], (i - 1) .. ':' .. ARGV[i + 1])
end
if length == 0 then redis.call('PEXPIRE', KEYS[2], ARGV[1]) end
return given
