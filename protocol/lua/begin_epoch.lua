-- Put a daemon in charge. Its epoch is unique and higher than any earlier epoch, even if the server has lost the
-- earlier epoch, because the new epoch is at least the server's time in microseconds.
-- KEYS epoch
-- Returns the epoch.
local now = redis.call('TIME')
local before = epoch_of(KEYS[1])
local epoch = string.format('%.0f', math.max(before + 1, now[1] * 1000000 + now[2]))
redis.call('SET', KEYS[1], epoch)
return epoch
