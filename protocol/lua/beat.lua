-- Renew a worker's sign of life and, where it is working, its lease. Only the owner renews: an unchecked XCLAIM by a
-- former owner would steal the job back. While a job runs, anything else that is pending with its worker was delivered
-- by a reply that got lost; it is handed back, for the sign of life would shield it for ever.
-- KEYS jobs worker    ARGV group consumer message lease_ms status released released_idle_ms
-- Returns 1 when the lease is held (or none was asked for), 0 when it is lost.
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
