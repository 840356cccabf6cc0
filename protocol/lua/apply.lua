-- Apply an outcome to the search's state once and delete the result from its stream, in one step. The stream therefore
-- holds only results that no daemon has applied yet.
-- KEYS epoch outcomes applied results done    ARGV epoch id outcome message
-- Returns 1 if the outcome was new, 0 if this id already had an outcome, or the refusal of fence.lua.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
local new = redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
if new == 1 then redis.call('RPUSH', KEYS[3], ARGV[2]) end
redis.call('XDEL', KEYS[4], ARGV[4])
redis.call('HDEL', KEYS[5], ARGV[2])
return new
