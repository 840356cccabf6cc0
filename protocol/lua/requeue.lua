-- Put a candidate of the ledger back on the job stream, unless it has an outcome already.
-- KEYS epoch candidates done outcomes jobs    ARGV epoch id fingerprint
-- Returns 1 when it was put back, 0 when it is done or unknown, -1 when another daemon has taken over, -2 when the data
-- is lost.
local epoch = redis.call('GET', KEYS[1])
if not epoch then return -2 end
if epoch ~= ARGV[1] then return -1 end
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 or redis.call('HEXISTS', KEYS[4], ARGV[2]) == 1 then return 0 end
local candidate = redis.call('HGET', KEYS[2], ARGV[2])
if not candidate then return 0 end
redis.call('XADD', KEYS[5], '*', 'id', ARGV[2], 'candidate', candidate, 'fingerprint', ARGV[3])
return 1
