-- Bring back what the daemon remembers and the server has lost: spec, card, ledger, outcomes and selections, in one step,
-- so that a daemon killed at it leaves nothing half restored. Where both know something, the daemon is right; what it
-- does not know stays, behind what it knows.
-- KEYS epoch spec card candidates issued outcomes applied selections state
-- ARGV epoch spec card ledger outcomes selections pair…
-- (`ledger`, `outcomes` and `selections` are how many pairs of id, or round, and JSON follow of each)
-- Returns {candidates and outcomes that came back, issued, applied}, or -1 when another daemon has taken over.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end

local function restore(hash, list, from, count)
  local there, remembered, restored = redis.call('LRANGE', list, 0, -1), {}, 0
  redis.call('DEL', list)
  for i = from, from + 2 * count - 2, 2 do
    restored = restored + redis.call('HSET', hash, ARGV[i], ARGV[i + 1])
    redis.call('RPUSH', list, ARGV[i])
    remembered[ARGV[i]] = true
  end
  for _, id in ipairs(there) do
    if not remembered[id] then redis.call('RPUSH', list, id) end
  end
  return restored
end

local ledger, outcomes, selections = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local first = 7
local restored = restore(KEYS[4], KEYS[5], first, ledger)
first = first + 2 * ledger
restored = restored + restore(KEYS[6], KEYS[7], first, outcomes)
first = first + 2 * outcomes
for i = first, first + 2 * selections - 2, 2 do redis.call('HSET', KEYS[8], ARGV[i], ARGV[i + 1]) end
redis.call('SET', KEYS[2], ARGV[2])
if ARGV[3] ~= '' then redis.call('SET', KEYS[3], ARGV[3]) end
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('HSET', KEYS[9], 'cursor', '0-0') end
redis.call('SET', KEYS[1], ARGV[1])
return {restored, redis.call('LLEN', KEYS[5]), redis.call('LLEN', KEYS[7])}
