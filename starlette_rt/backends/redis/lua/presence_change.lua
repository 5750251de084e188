-- Change who is present in a group and tell those who follow it, in one step. Every verb sets a state, so that saying
-- it twice is saying it once; the counts of a change that filled or emptied the group are kept for who asks again.
-- KEYS: users (user -> metas shown), entries (connection -> entry), order (user\0connection), connections of the
--       generation, generations (-> connections), lingering (connection -> deadline), dead generations, version {e,v},
--       the last answer
-- ARGV: format, generation, request, channel of members, channel of counts, grace ms, ms a fence stands, ms that the
--       version of an empty group and an answer are kept, most at once; then verb, connection, user, meta for each:
--       t track, x untrack, c close, e let leave whose grace is over, r reap the generation
-- An entry is format, generation ('' while it lingers), version, number, user and meta, in MessagePack.
-- Returns {"ok", epoch, version, members before, members after, ms until the next grace is over (-1: nobody lingers),
--          what the generation still has}
--         or {"fenced"}.
local users, entries, order, mine, generations = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local lingering, dead, state, memo = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local format, generation, request = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local grace, fence, keep, most = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local FIRST = 10

local said = redis.call('GET', memo)
if said then
  said = cmsgpack.unpack(said)
  if said[1] == request then return said[2] end
end
if ARGV[FIRST] ~= 'r' and redis.call('ZSCORE', dead, generation) then return {'fenced'} end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HMGET', state, 'e', 'v')
local epoch = known[1] or time[1] .. '.' .. time[2]
local version = tonumber(known[2] or 0)
local members, connections = redis.call('HLEN', users), redis.call('HLEN', entries)
local waiting = redis.call('ZCARD', lingering)
local events = {}

local function entry_of(connection)
  local raw = redis.call('HGET', entries, connection)
  if not raw then return nil end
  local at, _, holder, since, number, user = cmsgpack.unpack_limit(raw, 5)
  return {holder = holder, since = since, number = number, user = user, meta = string.sub(raw, at + 1)}
end

local function put(connection, holder, since, number, user, meta)
  redis.call('HSET', entries, connection, cmsgpack.pack(format, holder, since, number, user) .. meta)
end

local function tell(head, ...)
  events[#events + 1] = head .. cmsgpack.pack(...)
end

local function joined(user, connection, meta)
  tell('\148', 0, user, connection)
  events[#events] = events[#events] .. meta
end

local function remove(connection, entry, reason)
  redis.call('HDEL', entries, connection)
  redis.call('ZREM', order, entry.user .. '\0' .. connection)
  if redis.call('HINCRBY', users, entry.user, -1) <= 0 then redis.call('HDEL', users, entry.user) end
  if entry.holder == '' then
    waiting = waiting - redis.call('ZREM', lingering, connection)
  elseif entry.holder == generation then
    redis.call('SREM', mine, connection)
  end
  tell('\148', 1, entry.user, connection, reason)
end

-- Of those that linger under a user the one that says the same, else the one that has waited longest.
local function waiting_one(user, meta)
  if waiting == 0 or redis.call('HEXISTS', users, user) == 0 then return nil end
  local found, first, deadline
  local all = redis.call('ZRANGEBYLEX', order, '[' .. user .. '\0', '(' .. user .. '\1', 'LIMIT', 0, 100)
  for _, name in ipairs(all) do
    local connection = string.sub(name, #user + 2)
    local due = tonumber(redis.call('ZSCORE', lingering, connection) or nil)
    if due then
      local entry = entry_of(connection)
      if entry.meta == meta then return connection, entry end
      if not found or due < deadline then found, first, deadline = connection, entry, due end
    end
  end
  return found, first
end

local function track(number, connection, user, meta)
  local entry = entry_of(connection)
  if entry and entry.user ~= user then
    remove(connection, entry, 'left')
    entry = nil
  end
  if entry then
    if entry.holder == '' then waiting = waiting - redis.call('ZREM', lingering, connection) end
    if entry.meta ~= meta then
      put(connection, generation, version + 1, number, user, meta)
      joined(user, connection, meta)
    elseif entry.holder ~= generation then
      put(connection, generation, entry.since, entry.number, user, meta)
    end
    redis.call('SADD', mine, connection)
    return
  end
  local old, replaced = waiting_one(user, meta)
  if old then
    redis.call('HDEL', entries, old)
    redis.call('ZREM', order, user .. '\0' .. old)
    waiting = waiting - redis.call('ZREM', lingering, old)
    tell('\149', 2, user, connection, old)
    events[#events] = events[#events] .. meta
  else
    redis.call('HINCRBY', users, user, 1)
    joined(user, connection, meta)
  end
  if old and replaced.meta == meta then
    put(connection, generation, replaced.since, replaced.number, user, meta)
  else
    put(connection, generation, version + 1, number, user, meta)
  end
  redis.call('ZADD', order, 0, user .. '\0' .. connection)
  redis.call('SADD', mine, connection)
end

local function untrack(connection)
  local entry = entry_of(connection)
  if entry then remove(connection, entry, 'left') end
end

local function close(connection)
  local entry = entry_of(connection)
  if not entry or entry.holder == '' then return end
  put(connection, '', entry.since, entry.number, entry.user, entry.meta)
  redis.call('SREM', mine, connection)
  waiting = waiting + redis.call('ZADD', lingering, now + grace, connection)
end

local function expire()
  for _, connection in ipairs(redis.call('ZRANGEBYSCORE', lingering, '-inf', now, 'LIMIT', 0, most)) do
    local entry = entry_of(connection)
    if entry then remove(connection, entry, 'left') else redis.call('ZREM', lingering, connection) end
  end
end

local function reap()
  redis.call('ZREMRANGEBYSCORE', dead, '-inf', now)
  redis.call('ZADD', dead, now + fence, generation)
  redis.call('PEXPIRE', dead, fence)
  for _, connection in ipairs(redis.call('SRANDMEMBER', mine, most)) do
    local entry = entry_of(connection)
    if entry and entry.holder == generation then remove(connection, entry, 'node_lost') end
    redis.call('SREM', mine, connection)
  end
end

for at = FIRST, #ARGV, 4 do
  local verb, connection = ARGV[at], ARGV[at + 1]
  if verb == 't' then track(at, connection, ARGV[at + 2], ARGV[at + 3])
  elseif verb == 'x' then untrack(connection)
  elseif verb == 'c' then close(connection)
  elseif verb == 'e' then expire()
  elseif verb == 'r' then reap()
  end
end

local held = redis.call('SCARD', mine)
if held > 0 then redis.call('HSET', generations, generation, held) else redis.call('HDEL', generations, generation) end

local members_now, connections_now = members, connections
if #events > 0 then
  version = version + 1
  members_now, connections_now = redis.call('HLEN', users), redis.call('HLEN', entries)
  redis.call('HSET', state, 'e', epoch, 'v', string.format('%.0f', version))
  if connections_now == 0 then redis.call('PEXPIRE', state, keep)
  elseif connections == 0 then redis.call('PERSIST', state)
  end
  local count = #events < 65536 and '\220' .. struct.pack('>I2', #events) or '\221' .. struct.pack('>I4', #events)
  redis.call('PUBLISH', ARGV[4], '\148' .. cmsgpack.pack(format, epoch, version) .. count .. table.concat(events))
  if members_now ~= members or connections_now ~= connections then
    redis.call('PUBLISH', ARGV[5], cmsgpack.pack({format, epoch, version, members_now, connections_now}))
  end
end

local wait = waiting > 0 and math.max(0, redis.call('ZRANGE', lingering, 0, 0, 'WITHSCORES')[2] - now) or -1
local answer = {'ok', epoch, version, members, members_now, wait, held}
if (members == 0) ~= (members_now == 0) then
  redis.call('SET', memo, cmsgpack.pack({request, answer}), 'PX', keep)
end
return answer
