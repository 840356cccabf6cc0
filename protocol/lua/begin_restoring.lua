-- Begin to restore. From here on the daemon's own queue waits, for without an epoch it considers the data lost. An
-- earlier epoch stays: it tells restore.lua that the server runs on an older copy. Leftovers of a killed daemon are
-- deleted.
-- KEYS epoch [key to write to]…    ARGV epoch
-- Returns 0, or -1 if another daemon has taken over.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end
if not refused then redis.call('DEL', KEYS[1]) end
redis.call('UNLINK', unpack(KEYS, 2))
return 0
