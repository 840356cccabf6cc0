-- Delete a result that belongs to no candidate of this search, and its entry in `done`.
-- KEYS epoch results done    ARGV epoch cursor id
-- Returns 1, or the refusal of fence.lua.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
redis.call('XDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[3])
return 1
