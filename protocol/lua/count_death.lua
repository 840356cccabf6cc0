-- Count the death of an evaluation process on a job that its worker still owns. `death` identifies this death, so that
-- a repeated call after a lost reply does not count it twice.
-- KEYS jobs deaths    ARGV group consumer message id death
-- Returns the number of deaths so far.
local last = ARGV[4] .. ':last'
local mine = #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) > 0
local deaths = tonumber(redis.call('HGET', KEYS[2], ARGV[4]) or 0) or 0
if mine and redis.call('HGET', KEYS[2], last) ~= ARGV[5] then
  deaths = deaths + 1
  redis.call('HSET', KEYS[2], last, ARGV[5], ARGV[4], deaths)
end
return deaths
