-- Put a daemon in charge. Its epoch is higher than any before, and no other daemon's, not even of a server that has lost
-- its data since: the server's clock in microseconds is higher than what a daemon drew earlier.
-- KEYS epoch
-- Returns the epoch.
local now = redis.call('TIME')
local before = epoch_of(KEYS[1])
local epoch = string.format('%.0f', math.max(before + 1, now[1] * 1000000 + now[2]))
redis.call('SET', KEYS[1], epoch)
return epoch
