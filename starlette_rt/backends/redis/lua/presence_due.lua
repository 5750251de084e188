-- Settle a reminder, unless somebody has set another one meanwhile.
-- KEYS: reminders (name -> ms)
-- ARGV: name, its time as it was seen, its new time or 0 for none
local seen = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not seen or tonumber(seen) ~= tonumber(ARGV[2]) then return 0 end
if ARGV[3] == '0' then return redis.call('ZREM', KEYS[1], ARGV[1]) end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
return 1
