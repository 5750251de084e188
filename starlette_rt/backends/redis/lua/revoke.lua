-- Revoke rules, never for a shorter time than they are; forget what is over.
-- KEYS: sorted set of rules, each with the ms at which it ends
-- ARGV: whether all rules are wanted, then ms and rule of each
-- Returns the rules with their ms, or nothing.
for place = 2, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'GT', ARGV[place], ARGV[place + 1]) end
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', time[1] * 1000 + time[2] / 1000))
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')
if last[2] then redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', tonumber(last[2]))) end
if ARGV[1] == '1' then return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES') end
return {}
