-- Bring back what the daemon remembers and the server has lost: spec, card, ledger and outcomes, in one step, so that a
-- daemon killed at it leaves nothing half restored. What is there already stays; the lists take the daemon's order.
-- KEYS epoch spec card candidates issued outcomes applied state    ARGV epoch spec card ledger outcomes
-- (`ledger` and `outcomes` are how many pairs of id and JSON follow of each)
-- Returns how many candidates and outcomes came back, or -1 when another daemon has taken over.
local epoch = redis.call('GET', KEYS[1])
if epoch and epoch ~= ARGV[1] then return -1 end

local function restore(hash, list, from, count)
  local there, remembered, restored = redis.call('LRANGE', list, 0, -1), {}, 0
  redis.call('DEL', list)
  for i = from, from + 2 * count - 2, 2 do
    restored = restored + redis.call('HSETNX', hash, ARGV[i], ARGV[i + 1])
    redis.call('RPUSH', list, ARGV[i])
    remembered[ARGV[i]] = true
  end
  for _, id in ipairs(there) do
    if not remembered[id] then redis.call('RPUSH', list, id) end
  end
  return restored
end

local ledger, outcomes = tonumber(ARGV[4]), tonumber(ARGV[5])
local restored = restore(KEYS[4], KEYS[5], 6, ledger) + restore(KEYS[6], KEYS[7], 6 + 2 * ledger, outcomes)
redis.call('SET', KEYS[1], ARGV[1])
redis.call('SETNX', KEYS[2], ARGV[2])
if ARGV[3] ~= '' then redis.call('SETNX', KEYS[3], ARGV[3]) end
if not epoch then redis.call('HSET', KEYS[8], 'cursor', '0-0') end
return restored
