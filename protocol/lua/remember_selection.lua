-- Store the parents selected for a round, unless some are stored already.
-- KEYS epoch selections    ARGV epoch round parents
-- Returns the stored parents, or the refusal of fence.lua.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
return redis.call('HGET', KEYS[2], ARGV[2])
