-- Read who is present in a group: all, or the members of one page, with what they are shown with.
-- KEYS: users, entries, order, generations, version {e,v}
-- ARGV: nothing for all; else how many members at most, and '' or the user after whom they follow
-- Returns {epoch, version, members, connections, {connection, entry, ...}, {generation, ...}}.
local state = redis.call('HMGET', KEYS[5], 'e', 'v')
local found
if #ARGV == 0 then
  found = redis.call('HGETALL', KEYS[2])
else
  local most, connections = tonumber(ARGV[1]), {}
  local from, user, users = ARGV[2] == '' and '-' or '[' .. ARGV[2] .. '\1', nil, 0
  repeat
    local names = redis.call('ZRANGEBYLEX', KEYS[3], from, '+', 'LIMIT', 0, 200)
    for _, name in ipairs(names) do
      local at = string.find(name, '%z')
      if string.sub(name, 1, at - 1) ~= user then
        user, users = string.sub(name, 1, at - 1), users + 1
      end
      if users > most then break end
      connections[#connections + 1] = string.sub(name, at + 1)
    end
    from = #names > 0 and '(' .. names[#names]
  until users > most or #names < 200
  found = {}
  for at = 1, #connections do
    found[#found + 1] = connections[at]
    found[#found + 1] = redis.call('HGET', KEYS[2], connections[at])
  end
end
return {
  state[1] or '', tonumber(state[2] or 0), redis.call('HLEN', KEYS[1]), redis.call('HLEN', KEYS[2]), found,
  redis.call('HKEYS', KEYS[4]),
}
