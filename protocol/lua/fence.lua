-- Stands before every script that calls one of these.
-- An epoch is a whole number below 2^53, so that a double holds it. Anything else under its key is no epoch: 0.
local function epoch_of(key)
  local epoch = tonumber(redis.call('GET', key) or nil)
  if not epoch or epoch ~= math.floor(epoch) or epoch < 0 or epoch > 9007199254740992 then return 0 end
  return epoch
end

-- Why the daemon `mine` may not write, or nil where it may.
-- -1 where a later daemon has taken over; -2 where the data is lost: there is no epoch, or an earlier one, and then the
-- server runs on a copy from before this daemon's start.
local function refusal(key, mine)
  local epoch = epoch_of(key)
  if epoch > tonumber(mine) then return -1 end
  if epoch < tonumber(mine) then return -2 end
  return nil
end
