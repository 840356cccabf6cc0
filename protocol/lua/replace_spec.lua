-- Replace the spec of a search that never began, so that no candidate was issued under the old spec. Its counters
-- (seconds, requests) are deleted, and a daemon that was in charge of the search is no longer in charge.
-- KEYS spec state issued epoch    ARGV old spec, new spec
-- Returns 1, also when repeated after a lost reply; 0 if the search has begun, or has another spec.
if redis.call('GET', KEYS[1]) == ARGV[2] then return 1 end
if redis.call('EXISTS', KEYS[3]) == 1 or redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[4], string.format('%.0f', epoch_of(KEYS[4]) + 1))
return 1
