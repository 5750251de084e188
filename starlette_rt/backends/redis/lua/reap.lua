-- Condemn a generation whose lease is over: it can be held no more, and who has condemned it reaps it. Its reaper has
-- some time; after that another may go on.
-- KEYS: leases
-- ARGV: generation, ms that the reaper has
-- Returns 1 to the reaper, 0 to anybody else.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local score = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or nil)
if not score or score >= now or (score < 0 and -score >= now) then return 0 end
redis.call('ZADD', KEYS[1], -(now + tonumber(ARGV[2])), ARGV[1])
return 1
