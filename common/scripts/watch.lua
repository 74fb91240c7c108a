-- WATCH: note for some seconds that somebody reads requests' streams.
-- KEYS  the requests' sets of watchers   ARGV  1 milliseconds, then a watcher for each key
-- PEXPIRE comes first: it works even when the broker is full, and SADD is refused.
for i, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, ARGV[1])
  redis.pcall('SADD', key, ARGV[i + 1])
  redis.call('PEXPIRE', key, ARGV[1])
end
return #KEYS
