-- UNWATCH: somebody reads a request's stream no longer.
-- KEYS  1 its set of watchers   ARGV  1 the watcher
-- Gives the number of watchers that are left.
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SCARD', KEYS[1])
