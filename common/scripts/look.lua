-- LOOK: what a journal holds from an index on. Only reads.
-- KEYS  1 request hash, 2 journal   ARGV  1 first index, 2 last index
-- Gives {frames, the journal's length, 1 when the request is known or 0}
return {redis.call('LRANGE', KEYS[2], ARGV[1], ARGV[2]), redis.call('LLEN', KEYS[2]), redis.call('EXISTS', KEYS[1])}
