-- Renew a worker's heartbeat and, if it has a job, the job's lease. Only the owner may renew a lease, because an
-- unchecked XCLAIM by a former owner would take the job back. While a job runs, any other job that is pending with the
-- same worker was delivered by a lost reply. Such a job is handed back, because the worker's heartbeat would otherwise
-- protect it forever.
-- KEYS jobs worker    ARGV group consumer message lease_ms status released released_idle_ms
-- Returns 1 if the lease is held (or no message was given), 0 if the lease is lost.
redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[4])
if ARGV[3] == '' then return 1 end
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100, ARGV[2])) do
  if row[1] ~= ARGV[3] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[6], 0, row[1], 'IDLE', ARGV[7], 'JUSTID')
  end
end
return 1
