-- Delete the consumers of workers that have ended. Such a worker has no heartbeat and was idle for the length of a
-- lease. A consumer with pending jobs is kept, because deleting it would silently drop these jobs.
-- KEYS jobs    ARGV group worker_prefix lease_ms
-- Returns the number of deleted consumers.
local forgotten = 0
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #flat, 2 do consumer[flat[i]] = flat[i + 1] end
  local idle = consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[3])
  if idle and redis.call('EXISTS', ARGV[2] .. consumer['name']) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
    forgotten = forgotten + 1
  end
end
return forgotten
