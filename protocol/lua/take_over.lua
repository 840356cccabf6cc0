-- Take a job from an owner who shows no sign of life and has not renewed its lease.
-- KEYS jobs owner_worker    ARGV group owner consumer message lease_ms
-- Returns the entry, or false when the owner lives, the lease runs, or somebody else was first.
if redis.call('EXISTS', KEYS[2]) == 1 then return false end
if #redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[5], ARGV[4], ARGV[4], 1, ARGV[2]) == 0 then return false end
return redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], ARGV[5], ARGV[4])
