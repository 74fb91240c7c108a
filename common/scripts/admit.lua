-- ADMIT: a request of an API key begins, if the key has room for it.
-- KEYS  1 open requests, 2 budget
-- ARGV  1 id, 2 most open requests or 0, 3 tokens a minute or 0, 4 hold_ms
-- Gives {'OK'} | {'OPEN', open} | {'TOKENS', wait_ms}
-- The budget fills by the minute's tokens in a minute, up to these. It may be overdrawn: what an answer costs is known at its end.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local most, per_minute = tonumber(ARGV[2]), tonumber(ARGV[3])
if per_minute > 0 then
  local budget = redis.call('HMGET', KEYS[2], 'tokens', 'at')
  if budget[1] then
    local tokens = budget[1] + (now - budget[2]) * per_minute / 60000
    if tokens < 1 then return {'TOKENS', math.ceil((1 - tokens) * 60000 / per_minute)} end
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  local open = redis.call('ZCARD', KEYS[1])
  if most > 0 and open >= most then return {'OPEN', open} end
end
redis.call('ZADD', KEYS[1], now + ARGV[4], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {'OK'}
