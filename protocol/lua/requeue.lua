-- Enqueue candidates again if their job or their committed outcome is lost. The caller has read each of the two streams
-- up to one entry, and passes the ids that it did not find. This script checks the entries that were added since then.
-- KEYS epoch candidates done outcomes jobs results    ARGV epoch fingerprint last_job last_result id…
-- Returns the number of candidates that were enqueued, or the refusal of fence.lua.
local refused = refusal(KEYS[1], ARGV[1])
if refused then return refused end
local there, requeued = {}, 0
for stream, last in pairs({[KEYS[5]] = ARGV[3], [KEYS[6]] = ARGV[4]}) do
  for _, entry in ipairs(redis.call('XRANGE', stream, '(' .. last, '+')) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'id' then there[entry[2][i + 1]] = true end
    end
  end
end
for i = 5, #ARGV do
  local id = ARGV[i]
  local candidate = redis.call('HGET', KEYS[2], id)
  if candidate and not there[id] and redis.call('HEXISTS', KEYS[4], id) == 0 then
    redis.call('HDEL', KEYS[3], id)
    redis.call('XADD', KEYS[5], '*', 'id', id, 'candidate', candidate, 'fingerprint', ARGV[2])
    requeued = requeued + 1
  end
end
return requeued
