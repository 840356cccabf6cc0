-- Renew a worker's sign of life and, where it is working, its lease. Only the owner renews: an unchecked XCLAIM by a
-- former owner would steal the job back.
-- KEYS jobs worker    ARGV group consumer message lease_ms status
-- Returns 1 when the lease is held (or none was asked for), 0 when it is lost.
redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[4])
if ARGV[3] == '' then return 1 end
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return 1
