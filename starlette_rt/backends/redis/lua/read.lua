-- Where the log of a group ends and, if that is asked, what it keeps; a log that is not there is begun.
-- KEYS: state {e,s,t,r,f}, log
-- ARGV: new epoch, run id, state ms, ms of a state in which nothing was said, size (0: nothing is kept for us), format
-- Returns {epoch, offset, tag, entries}.
local state = redis.call('HMGET', KEYS[1], 'e', 's', 't', 'r')
local epoch, top, last, run = state[1], tonumber(state[2] or 0), state[3] or '', state[4]
if not epoch then
  epoch = ARGV[1]
  redis.call('HSET', KEYS[1], 'e', epoch, 's', 0, 't', '', 'r', ARGV[2], 'f', ARGV[6])  -- before the DEL, see publish
  redis.call('DEL', KEYS[2])
elseif ARGV[2] ~= '' and run ~= ARGV[2] then
  epoch = ARGV[1]
  redis.call('HSET', KEYS[1], 'e', epoch, 'r', ARGV[2])
end
redis.call('PEXPIRE', KEYS[1], top > 0 and ARGV[3] or ARGV[4])
local entries = {}
if tonumber(ARGV[5]) > 0 then entries = redis.call('LRANGE', KEYS[2], -tonumber(ARGV[5]), -1) end
return {epoch, top, last, entries}
