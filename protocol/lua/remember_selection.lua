-- Store the selection of a round, unless one is stored already.
-- KEYS epoch selections    ARGV epoch round selection
-- Returns the stored selection, or the refusal of fence.lua.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
return redis.call('HGET', KEYS[2], ARGV[2])
