-- Give a claim back, if it is still this one and not settled.
-- KEYS: the claim
-- ARGV: name of the claim
local kept = redis.call('GET', KEYS[1])
if kept and string.sub(kept, 2, 2) ~= 'a' and string.sub(kept, 3) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
