-- Take a job whose owner has no heartbeat and whose lease has expired, and count the owner's death. Or take a job that
-- was handed back, and count no death. A claimer is refused if it read `server_ms`, the server's time, longer ago than
-- the length of a lease. The server may have been frozen since then, and after that every owner looks dead.
-- KEYS jobs deaths    ARGV group consumer message lease_ms released server_ms worker_prefix
-- Returns {entry, deaths, owner}, or false if the owner is alive, the lease has not expired, another worker was first,
-- or the job's entry is deleted.
local row = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[4], ARGV[3], ARGV[3], 1)[1]
if not row then return false end
local owner = row[2]
if owner ~= ARGV[5] then
  local now = redis.call('TIME')
  if now[1] * 1000 + now[2] / 1000 - ARGV[6] > tonumber(ARGV[4]) then return false end
  if redis.call('EXISTS', ARGV[7] .. owner) == 1 then return false end
end
local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[4], ARGV[3])[1]
if not entry then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
  return false
end
local id = false
for i = 1, #entry[2], 2 do
  if entry[2][i] == 'id' then id = entry[2][i + 1] end
end
if not id then return {entry, 0, owner} end
local deaths = tonumber(redis.call('HGET', KEYS[2], id) or 0) or 0
if owner ~= ARGV[5] then
  deaths = deaths + 1
  redis.call('HSET', KEYS[2], id, deaths)
end
return {entry, deaths, owner}
