-- Hand a job back at once: make its lease look expired and withdraw the owner's sign of life.
-- KEYS jobs worker    ARGV group consumer message lease_ms
redis.call('DEL', KEYS[2])
if ARGV[3] == '' then return 0 end
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')
return 1
