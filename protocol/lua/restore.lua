-- Replace the server's data by the data that restore_part.lua has written, together with the spec, the profile and the
-- command, and put the daemon in charge, all in one step. The daemon's copy is complete, so it replaces everything. A
-- command that was given after the server was emptied is newer than the daemon's command and is kept. A command in an
-- older copy is replaced.
-- KEYS epoch spec profile control last_command [written key]…    ARGV epoch spec profile command [length]…
-- Returns 0; -1 if another daemon has taken over; -3 if the written data may be incomplete. In that case a part of
-- it is lost, or the daemon's epoch exists, so that its queue may have written meanwhile.
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
