-- Settle a claim, whoever has it; the first answer stays.
-- KEYS: the claim
-- ARGV: format, answer, ms that it is kept
-- Returns the answer that was there, or nothing.
local kept = redis.call('GET', KEYS[1])
if kept and string.sub(kept, 2, 2) == 'a' then return string.sub(kept, 3) end
redis.call('SET', KEYS[1], ARGV[1] .. 'a' .. ARGV[2], 'PX', ARGV[3])
return false
