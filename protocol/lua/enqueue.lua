-- Put a candidate on the job stream, only for the daemon in charge, and only once even if the call is repeated.
-- KEYS epoch candidates issued jobs    ARGV epoch id candidate fingerprint
-- Returns 1 if the candidate was new, 0 if it was enqueued before, or the refusal of fence.lua.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
if redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3]) == 0 then return 0 end
redis.call('RPUSH', KEYS[3], ARGV[2])
redis.call('XADD', KEYS[4], '*', 'id', ARGV[2], 'candidate', ARGV[3], 'fingerprint', ARGV[4])
return 1
