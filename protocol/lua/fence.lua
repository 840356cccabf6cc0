-- Stands before every script that calls it: why the daemon `mine` may not write, or nil where it may. An epoch is a
-- number below 2^53, so that a double holds it.
-- -1 where a later daemon has taken over; -2 where the data is lost: there is no epoch, or an earlier one, and then the
-- server runs on a copy from before this daemon's start.
local function refusal(key, mine)
  local epoch = tonumber(redis.call('GET', key) or nil) or 0
  if epoch > tonumber(mine) then return -1 end
  if epoch < tonumber(mine) then return -2 end
  return nil
end
