-- Read what is commanded: the control key and the command that was understood last, as far as a command is long, and the
-- epoch. A key of another type than a string is text that means nothing.
-- KEYS control understood epoch
-- Returns {control or false, understood or false, epoch or 0}.
local function text(key)
  local kind = redis.call('TYPE', key)['ok']
  if kind == 'none' then return false end
  if kind ~= 'string' then return '(' .. kind .. ')' end
  return redis.call('GETRANGE', key, 0, 39)
end
return {text(KEYS[1]), text(KEYS[2]), string.format('%.0f', epoch_of(KEYS[3]))}
