-- Begin to restore lost data. The daemon's own epoch is deleted, so that its queue waits until the data is restored. An
-- earlier daemon's epoch is kept, because it tells restore.lua that the server runs on an older copy. Temporary keys
-- that a killed daemon left are deleted.
-- KEYS epoch [key to write to]…    ARGV epoch
-- Returns 0, or -1 if another daemon has taken over.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end
if not refused then redis.call('DEL', KEYS[1]) end
redis.call('UNLINK', unpack(KEYS, 2))
return 0
