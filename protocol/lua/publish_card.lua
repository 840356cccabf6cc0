-- Publish a worker's card, unless the search has another spec than the worker, or a card of this spec already.
-- KEYS spec card    ARGV spec fingerprint card
-- Returns the card that counts, or false when the search has another spec (or none).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local there = redis.call('GET', KEYS[2])
local readable, card = pcall(cjson.decode, there or '')
if readable and type(card) == 'table' and card['fingerprint'] == ARGV[2] then return there end
redis.call('SET', KEYS[2], ARGV[3])
return ARGV[3]
