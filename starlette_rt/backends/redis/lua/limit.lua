-- Take from every budget of one subject, or from none: the generic cell rate algorithm of limits.py, by the clock of
-- Redis, in microseconds since a day of which they are still exact.
-- KEYS: the budgets
-- ARGV: format, name of this call, then for each budget: amount, number of rates, interval and tolerance of each
-- What is kept: the format, the names of the calls that passed last, and the theoretical arrival time of each rate.
-- Returns the microseconds to wait, 0 if it is taken, then for each rate how far it is taken beyond now.
local NAMES = 8  -- calls that are recognised when they are made again; all names are of one length
local time = redis.call('TIME')
local now = (time[1] - 1700000000) * 1000000 + time[2]
local wait, again, place, budgets, ahead = 0, false, 3, {}, {}

for number, key in ipairs(KEYS) do
  local kept = redis.call('GET', key)
  local names, rest = string.match(kept or '', '^%d+ (%S*) (.*)$')
  local before, after = {}, {}
  for tat in string.gmatch(rest or '', '%S+') do before[#before + 1] = tonumber(tat) end
  again = again or (names and string.find(names, ARGV[2] .. ',', 1, true))
  local amount, rates = tonumber(ARGV[place]), tonumber(ARGV[place + 1])
  for rate = 1, rates do
    local interval, tolerance = tonumber(ARGV[place + 2 * rate]), tonumber(ARGV[place + 2 * rate + 1])
    local tat = math.max(before[rate] or now, now)
    wait = math.max(wait, tat + amount * interval - now - interval - tolerance)
    before[rate], after[rate] = tat, tat + amount * interval
  end
  budgets[number] = {names or '', before, after}
  place = place + 2 + 2 * rates
end

local taken = wait <= 1 and not again  -- a microsecond is forgiven: what rounding makes of times that should be equal
for number, key in ipairs(KEYS) do
  local names, before, after = unpack(budgets[number])
  local tats, furthest = {}, now
  for rate, tat in ipairs(taken and after or before) do
    ahead[#ahead + 1] = math.ceil(tat - now)
    tats[rate] = string.format('%.3f', tat)
    furthest = math.max(furthest, tat)
  end
  if taken then
    names = string.sub(ARGV[2] .. ',' .. names, 1, NAMES * (#ARGV[2] + 1))
    local ms = math.max(2000, math.ceil((furthest - now) / 1000))  -- so long may a call be on its way twice
    redis.call('SET', key, ARGV[1] .. ' ' .. names .. ' ' .. table.concat(tats, ' '), 'PX', string.format('%.0f', ms))
  end
end
return {(taken or again) and 0 or math.ceil(wait), unpack(ahead)}
