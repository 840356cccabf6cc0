-- Begin to restore: the daemon's own queue waits from here on, for without an epoch it takes the data for lost. An earlier
-- epoch stays: restore.lua must know that the server runs on an older copy. What a killed daemon left is deleted.
-- KEYS epoch [key to write to]…    ARGV epoch
-- Returns 0, or -1 when another daemon has taken over.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end
if not refused then redis.call('DEL', KEYS[1]) end
redis.call('UNLINK', unpack(KEYS, 2))
return 0
