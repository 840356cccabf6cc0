-- Put a daemon in charge. Its epoch is unique and higher than any before, even if the server has lost its data since:
-- the server's clock in microseconds exceeds every earlier epoch.
-- KEYS epoch
-- Returns the epoch.
local now = redis.call('TIME')
local before = epoch_of(KEYS[1])
local epoch = string.format('%.0f', math.max(before + 1, now[1] * 1000000 + now[2]))
redis.call('SET', KEYS[1], epoch)
return epoch
