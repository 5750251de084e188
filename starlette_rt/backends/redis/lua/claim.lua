-- Take a key that may be taken once; one whose holder has gone changes hands.
-- KEYS: the claim
-- ARGV: format, name of this claim, ms that it is kept, name of the claim whose holder has gone (empty: of none)
-- What is kept: the format, then r (running) or l (running, and begun by one that was lost) and the claim's name, or
-- a (answered) and the answer.
-- Returns {"first"}, {"lost"}, {"running", name} or {"answered", answer, ms left}.
local kept = redis.call('GET', KEYS[1])
if kept then
  local kind, rest = string.sub(kept, 2, 2), string.sub(kept, 3)
  if kind == 'a' then return {'answered', rest, redis.call('PTTL', KEYS[1])} end
  if rest == ARGV[2] then return {kind == 'l' and 'lost' or 'first'} end  -- this is asked for the second time
  if rest ~= ARGV[4] then return {'running', rest} end
end
redis.call('SET', KEYS[1], ARGV[1] .. (kept and 'l' or 'r') .. ARGV[2], 'PX', ARGV[3])
return {kept and 'lost' or 'first'}
