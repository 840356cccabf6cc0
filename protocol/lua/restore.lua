-- Put what restore_part.lua has written in the place of what the server has, with the spec, the profile and the command, and
-- put the daemon in charge: all in one step. What the daemon remembers is all there is to know, so it replaces the rest.
-- A command that was given after the server was emptied is newer than the daemon's; one of an older copy is not.
-- KEYS epoch spec profile control understood [written key]…    ARGV epoch spec profile command [length]…
-- Returns 0, -1 when another daemon has taken over, or -3 where what was written may not be complete: a part of it is
-- lost, or the daemon's epoch is there, so that its queue could write meanwhile.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end
if not refused then return -3 end

local function length(key)
  local kind = redis.call('TYPE', key)['ok']
  if kind == 'list' then return redis.call('LLEN', key) end
  return kind == 'hash' and redis.call('HLEN', key) or 0
end

for i = 6, #KEYS, 2 do
  if length(KEYS[i]) ~= tonumber(ARGV[i / 2 + 2]) then return -3 end
end
for i = 6, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    redis.call('RENAME', KEYS[i], KEYS[i + 1])
  else
    redis.call('UNLINK', KEYS[i + 1])
  end
end
redis.call('SET', KEYS[2], ARGV[2])
if ARGV[3] ~= '' then redis.call('SET', KEYS[3], ARGV[3]) end
local older = redis.call('EXISTS', KEYS[1]) == 1
if ARGV[4] ~= '' and (older or redis.call('EXISTS', KEYS[4]) == 0) then
  redis.call('SET', KEYS[4], ARGV[4])
  redis.call('SET', KEYS[5], ARGV[4])
end
redis.call('SET', KEYS[1], ARGV[1])
return 0
