-- Give a search that never began another spec: no candidate was issued under the old one. What was counted for it (seconds,
-- requests) is forgotten with it, and whoever was in charge of it is no longer.
-- KEYS spec state issued epoch    ARGV old spec, new spec
-- Returns 1, also when it is asked again because the answer was lost; 0 when the search has begun, or has another spec.
if redis.call('GET', KEYS[1]) == ARGV[2] then return 1 end
if redis.call('EXISTS', KEYS[3]) == 1 or redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[4], string.format('%.0f', epoch_of(KEYS[4]) + 1))
return 1
