-- Bring back what the daemon remembers and the server has lost: spec, card, ledger and outcomes, in one step, so that a
-- daemon killed at it leaves nothing half restored. What is there already stays as it is.
-- KEYS epoch spec card candidates issued outcomes applied state    ARGV epoch spec card ledger outcomes
-- (`ledger` and `outcomes` are how many pairs of id and JSON follow of each)
-- Returns how many candidates and outcomes came back, or -1 when another daemon has taken over.
local epoch = redis.call('GET', KEYS[1])
if epoch and epoch ~= ARGV[1] then return -1 end
local at, restored = 6, 0
for _ = 1, ARGV[4] do
  if redis.call('HSETNX', KEYS[4], ARGV[at], ARGV[at + 1]) == 1 then
    redis.call('RPUSH', KEYS[5], ARGV[at])
    restored = restored + 1
  end
  at = at + 2
end
for _ = 1, ARGV[5] do
  if redis.call('HSETNX', KEYS[6], ARGV[at], ARGV[at + 1]) == 1 then
    redis.call('RPUSH', KEYS[7], ARGV[at])
    restored = restored + 1
  end
  at = at + 2
end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('SETNX', KEYS[2], ARGV[2])
if ARGV[3] ~= '' then redis.call('SETNX', KEYS[3], ARGV[3]) end
if not epoch then redis.call('HSET', KEYS[8], 'cursor', '0-0') end
return restored
