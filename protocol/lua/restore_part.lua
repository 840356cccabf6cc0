-- Write a part of what the daemon remembers to keys beside the real ones; restore.lua moves them into place.
-- KEYS epoch hash [list]    ARGV epoch pair…
-- Returns 0, or -1 when another daemon has taken over.
local refused = refusal(KEYS[1], ARGV[1])
if refused == -1 then return refused end
for i = 2, #ARGV, 2 do
  -- A part whose answer was lost comes again.
  if redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 and KEYS[3] then redis.call('RPUSH', KEYS[3], ARGV[i]) end
end
return 0
