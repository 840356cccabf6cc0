-- Move a job without a candidate id from the job stream to the dead-letter stream.
-- KEYS jobs dead    ARGV group consumer message detail most
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[3]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[5], '*',
  'id', '', 'reason', 'unreadable', 'worker', ARGV[2], 'detail', ARGV[4])
return 1
