-- Apply an outcome to the search's state once, move the keeper's cursor and drop the result, all in one step.
-- KEYS epoch outcomes applied state results done    ARGV epoch id outcome cursor
-- Returns 1 when it was new, 0 when this id had one already, or what fence.lua says.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
local new = redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
if new == 1 then redis.call('RPUSH', KEYS[3], ARGV[2]) end
redis.call('HSET', KEYS[4], 'cursor', ARGV[4])
redis.call('XDEL', KEYS[5], ARGV[4])
redis.call('HDEL', KEYS[6], ARGV[2])
return new
