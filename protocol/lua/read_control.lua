-- Read the control key, the last valid command and the epoch. The first two are cut at 40 characters. If a key is not a
-- string, a text that is no valid command is returned for it.
-- KEYS control last_command epoch
-- Returns {control or false, last_command or false, epoch or 0}.
local function text(key)
  local kind = redis.call('TYPE', key)['ok']
  if kind == 'none' then return false end
  if kind ~= 'string' then return '(' .. kind .. ')' end
  return redis.call('GETRANGE', key, 0, 39)
end
return {text(KEYS[1]), text(KEYS[2]), string.format('%.0f', epoch_of(KEYS[3]))}
