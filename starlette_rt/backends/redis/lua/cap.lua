-- Count the connections of one person on all nodes, and let one more in if there is room.
-- KEYS: hash of generations, each with the format and how many connections it has
-- ARGV: format, own generation, how many it has with the new one, how many there may be in all, ms that it is kept,
-- then generations that have gone
-- Returns {1}, or {0} and the other generations that have some.
for place = 6, #ARGV do redis.call('HDEL', KEYS[1], ARGV[place]) end
local kept = redis.call('HGETALL', KEYS[1])
local sum, found = tonumber(ARGV[3]), {0}
for place = 1, #kept, 2 do
  if kept[place] ~= ARGV[2] then
    sum = sum + tonumber(string.match(kept[place + 1], '%d+$'))
    found[#found + 1] = kept[place]
  end
end
if sum > tonumber(ARGV[4]) then return found end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[1] .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return {1}
