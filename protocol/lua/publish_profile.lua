-- Publish a worker's profile, unless the search has another spec, or already has a profile of this spec.
-- KEYS spec profile    ARGV spec fingerprint profile
-- Returns the profile that is then stored, or false if the search has another spec or no spec.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local there = redis.call('GET', KEYS[2])
local readable, profile = pcall(cjson.decode, there or '')
if readable and type(profile) == 'table' and profile['fingerprint'] == ARGV[2] then return there end
redis.call('SET', KEYS[2], ARGV[3])
return ARGV[3]
