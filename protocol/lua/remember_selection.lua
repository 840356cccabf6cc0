-- Keep the parents that were chosen for a round, unless some are kept already.
-- KEYS epoch selections    ARGV epoch round parents
-- Returns the parents that are kept, or what fence.lua says.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
return redis.call('HGET', KEYS[2], ARGV[2])
