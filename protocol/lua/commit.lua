-- Commit an outcome. The first one for an id counts; the job is taken off the stream in any case.
-- KEYS jobs results done    ARGV group consumer message id outcome
-- Returns 1 when this outcome counts, 0 when another was first.
local first = redis.call('HSETNX', KEYS[3], ARGV[4], ARGV[2])
if first == 1 then redis.call('XADD', KEYS[2], '*', 'id', ARGV[4], 'outcome', ARGV[5]) end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return first
