-- Take a result off its stream that belongs to no candidate of this search, and forget that it was the first.
-- KEYS epoch results done    ARGV epoch cursor id
-- Returns 1, or what fence.lua says.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
redis.call('XDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[3])
return 1
