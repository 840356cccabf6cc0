-- Commit an outcome. The first outcome for an id counts. The job is deleted from the stream in any case. A job that is
-- given up is added to the dead-letter stream in the same step.
-- KEYS jobs results done outcomes deaths dead    ARGV group consumer message id outcome [reason worker detail most]
-- Returns 1 if this outcome counts, 0 if another outcome was first.
local first = 0
if redis.call('HEXISTS', KEYS[4], ARGV[4]) == 0 then first = redis.call('HSETNX', KEYS[3], ARGV[4], ARGV[2]) end
if first == 1 then
  redis.call('XADD', KEYS[2], '*', 'id', ARGV[4], 'outcome', ARGV[5])
  if ARGV[6] then
    redis.call('XADD', KEYS[6], 'MAXLEN', ARGV[9], '*',
      'id', ARGV[4], 'reason', ARGV[6], 'worker', ARGV[7], 'detail', ARGV[8])
  end
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
redis.call('HDEL', KEYS[5], ARGV[4], ARGV[4] .. ':last')
return first
