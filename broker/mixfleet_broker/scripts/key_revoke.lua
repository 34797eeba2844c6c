-- Take an API key out of use for good.
--
-- KEYS[1]  the key's record (api_key)
-- ARGV     1 key id, 2 whether nothing of it is kept either
-- Result   1 done; 0 there is no such key
-- Keeps    no secret of the key opens anything. Its record stays, and with it in the list the demand
--          for a key, until somebody asks to forget it.

local key_id = ARGV[1]
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for _, digest in ipairs(redis.call('HMGET', KEYS[1], 'digest', 'old_digest')) do
  if digest then redis.call('DEL', key.api_secret(digest)) end
end
redis.call('HDEL', KEYS[1], 'digest', 'old_digest', 'old_until_ms')
redis.call('HSETNX', KEYS[1], 'revoked_ms', whole(now_ms))
if ARGV[2] == '1' then
  -- One by one: rules of least privilege have a part for each kind of key, a command must fit into one.
  redis.call('DEL', key.api_use(key_id))
  redis.call('DEL', key.api_jobs(key_id))
  redis.call('DEL', KEYS[1])
  redis.call('ZREM', key.api_keys(), key_id)
end
return 1
