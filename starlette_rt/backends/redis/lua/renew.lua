-- Begin a new epoch where the log ends, if that is still where it was seen to end.
-- KEYS: state {e,s,t,r,f}, log
-- ARGV: new epoch, run id, state ms, ms of a state in which nothing was said, epoch seen, tag seen, format
-- Returns {epoch, offset, tag} as they are then.
local state = redis.call('HMGET', KEYS[1], 'e', 's', 't', 'r')
local epoch, top, last, run = state[1], tonumber(state[2] or 0), state[3] or '', state[4]
if not epoch then
  redis.call('HSET', KEYS[1], 's', 0, 't', '', 'f', ARGV[7])  -- before the DEL, see publish
  redis.call('DEL', KEYS[2])
end
if not epoch or (ARGV[2] ~= '' and run ~= ARGV[2]) or (epoch == ARGV[5] and last == ARGV[6]) then
  epoch = ARGV[1]
  redis.call('HSET', KEYS[1], 'e', epoch, 'r', ARGV[2])
end
redis.call('PEXPIRE', KEYS[1], top > 0 and ARGV[3] or ARGV[4])
return {epoch, top, last}
