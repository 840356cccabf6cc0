-- Apply an outcome to the search's state once and take the result off its stream, in one step. What is on the stream is
-- therefore what no daemon has applied yet.
-- KEYS epoch outcomes applied results done    ARGV epoch id outcome message
-- Returns 1 when it was new, 0 when this id had one already, or what fence.lua says.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
local new = redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
if new == 1 then redis.call('RPUSH', KEYS[3], ARGV[2]) end
redis.call('XDEL', KEYS[4], ARGV[4])
redis.call('HDEL', KEYS[5], ARGV[2])
return new
