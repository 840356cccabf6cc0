-- Functions that check a daemon's epoch, prepended to every script that calls one of them.
-- An epoch is a whole number below 2^53, which a double represents exactly. Any other value counts as 0.
local function epoch_of(key)
  local epoch = tonumber(redis.call('GET', key) or nil)
  if not epoch or epoch ~= math.floor(epoch) or epoch < 0 or epoch > 9007199254740992 then return 0 end
  return epoch
end

-- Returns nil if the daemon with the epoch `mine` may write, else -1 if a later daemon has taken over, or -2 if the
-- server has lost its data. In the last case there is no epoch, or there is an earlier epoch because the server runs on
-- a copy from before this daemon's start.
local function refusal(key, mine)
  local epoch = epoch_of(key)
  if epoch > tonumber(mine) then return -1 end
  if epoch < tonumber(mine) then return -2 end
  return nil
end
