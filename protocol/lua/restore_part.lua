-- Write a part of the daemon's copy to temporary keys, which restore.lua renames.
-- KEYS epoch hash [list]    ARGV epoch pair…
-- Returns 0, or -1 if another daemon has taken over.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end
for i = 2, #ARGV, 2 do
  -- A part is written again if its reply was lost.
  if redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 and KEYS[3] then redis.call('RPUSH', KEYS[3], ARGV[i]) end
end
return 0
