-- Sign off a worker: hand back its pending jobs, and delete its heartbeat and its consumer. Jobs that are handed back
-- belong to the consumer `released`. Any worker may take them from it, and no death is counted.
-- KEYS jobs worker    ARGV group consumer released released_idle_ms
redis.call('DEL', KEYS[2])
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 10000, ARGV[2])) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, row[1], 'IDLE', ARGV[4], 'JUSTID')
end
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
return 1
