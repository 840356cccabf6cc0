-- Take a job from an owner who shows no sign of life and has not renewed its lease, and count the owner's death; or take
-- one that was handed back, which is nobody's death. A claimer whose view is older than a lease is refused: while it
-- waited, the server may have stood still, and then every owner looks dead.
-- KEYS jobs owner_worker deaths    ARGV group owner consumer message lease_ms released server_ms
-- Returns {entry, deaths}, or false when the owner lives, the lease runs, somebody else was first, or the body is gone.
if redis.call('EXISTS', KEYS[2]) == 1 then return false end
local now = redis.call('TIME')
if ARGV[2] ~= ARGV[6] and now[1] * 1000 + now[2] / 1000 - ARGV[7] > tonumber(ARGV[5]) then return false end
if #redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[5], ARGV[4], ARGV[4], 1, ARGV[2]) == 0 then return false end
local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], ARGV[5], ARGV[4])[1]
if not entry then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[4])
  return false
end
local id = false
for i = 1, #entry[2], 2 do
  if entry[2][i] == 'id' then id = entry[2][i + 1] end
end
if not id then return {entry, 0} end
if ARGV[2] ~= ARGV[6] then redis.call('HINCRBY', KEYS[3], id, 1) end
return {entry, tonumber(redis.call('HGET', KEYS[3], id) or 0)}
