-- Put a candidate of the ledger back on the job stream, unless a worker has already committed its outcome.
-- KEYS epoch candidates done jobs    ARGV epoch id fingerprint
-- Returns 1 when it was put back, 0 when it is done or unknown, -1 when another daemon has taken over.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 then return 0 end
local candidate = redis.call('HGET', KEYS[2], ARGV[2])
if not candidate then return 0 end
redis.call('XADD', KEYS[4], '*', 'id', ARGV[2], 'candidate', candidate, 'fingerprint', ARGV[3])
return 1
