-- Append a publication to the log of its group and tell every node, in one step.
-- KEYS: state {e,s,t,r,f}, log, ids (by offset)
-- ARGV: channel, publication, tag, id, new epoch, size, ttl ms, state ms, ids ms, how many ids, format, run id, latest ms
-- Returns {"ok" or "again", epoch, offset, tag}, or {"late", now ms} if it comes too late for who has said it.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if now > tonumber(ARGV[13]) then return {'late', string.format('%.0f', now)} end

local state = redis.call('HMGET', KEYS[1], 'e', 's', 't', 'r')
local epoch, top, last = state[1], tonumber(state[2] or 0), state[3] or ''
if not epoch then  -- a log without its state is of no log that anybody knows
  epoch, top, last = ARGV[5], 0, ''
  redis.call('HSET', KEYS[1], 'e', epoch, 'r', ARGV[12], 'f', ARGV[11])  -- first: a DEL would let it past a full memory
  redis.call('DEL', KEYS[2], KEYS[3])
elseif ARGV[12] ~= '' and state[4] ~= ARGV[12] then  -- another run of the server: its tail may have been lost
  epoch = ARGV[5]
  redis.call('HSET', KEYS[1], 'e', epoch, 'r', ARGV[12])
end

local first = ARGV[4] ~= '' and redis.call('ZSCORE', KEYS[3], ARGV[4])
if first then  -- its tag is known while it is kept
  local entry = redis.call('LINDEX', KEYS[2], tonumber(first) - top - 1)
  return {'again', epoch, tonumber(first), entry and string.match(entry, '^%d+@%d+ (%w*) ') or ''}
end

local offset = top + 1
local number = string.format('%.0f', offset)
local entry = ARGV[11] .. '@' .. number .. ' ' .. ARGV[3] .. ' ' .. last .. ' ' .. ARGV[2]
redis.call('HSET', KEYS[1], 's', number, 't', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[8])
local size = tonumber(ARGV[6])
if redis.call('RPUSH', KEYS[2], entry) >= size + 16 then redis.call('LTRIM', KEYS[2], -size, -1) end
redis.call('PEXPIRE', KEYS[2], ARGV[7])
if ARGV[4] ~= '' then
  redis.call('ZADD', KEYS[3], number, ARGV[4])
  if offset % 16 == 0 then redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - tonumber(ARGV[10])) end
  redis.call('PEXPIRE', KEYS[3], ARGV[9])
end
redis.call('PUBLISH', ARGV[1], entry)
return {'ok', epoch, offset, ARGV[3]}
