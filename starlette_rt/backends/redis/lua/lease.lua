-- Take or hold the lease of a generation, and learn who else holds one and what nobody has looked after.
-- KEYS: leases (generation -> end in ms; below 0: condemned, -ms until when its reaper may work), reminders (name -> ms)
-- ARGV: verb (take, hold), generation, lease ms, ms that a reminder must be late, ms that it is then mine, most at once
-- Returns {"ok", now, end of the lease before or 0, {generation, end, ...}, {name, its new time, ...}}
--         or {"refused"} to who would hold what it has lost.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local before = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[2]) or -1)
if ARGV[1] == 'hold' and before < 0 then return {'refused'} end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[2])

local due = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - tonumber(ARGV[4]), 'LIMIT', 0, ARGV[6])) do
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[5]), name)
  due[#due + 1] = name
  due[#due + 1] = now + tonumber(ARGV[5])
end
return {'ok', now, math.max(before, 0), redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), due}
