-- Tell every node a publication that may come again, the first time that it comes.
-- KEYS: the mark of its id
-- ARGV: channel, message, ms that the mark is kept
-- Where Redis is too full for the mark it is told each time.
if redis.pcall('SET', KEYS[1], '1', 'NX', 'PX', ARGV[3]) then redis.call('PUBLISH', ARGV[1], ARGV[2]) end
return 1
