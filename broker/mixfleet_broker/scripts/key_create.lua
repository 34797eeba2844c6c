-- Make an API key.
--
-- KEYS[1]  the key's record (api_key)
-- ARGV     1 key id, 2 digest of its secret, 3 ms that it lives or -1; the rest are field, value, ...
--          of its terms
-- Result   1 made, also by an earlier call with this secret; 0 the id is taken
-- Keeps    the record, the secret's digest and the list of keys name each other.

local key_id, digest, life_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local known = redis.call('HGET', KEYS[1], 'digest')
if known then return known == digest and 1 or 0 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end -- revoked

redis.call('HSET', KEYS[1], 'key_id', key_id, 'digest', digest, 'created_ms', whole(now_ms),
  'expires_ms', life_ms >= 0 and whole(now_ms + life_ms) or '', unpack(ARGV, 4))
redis.call('SET', key.api_secret(digest), key_id)
redis.call('ZADD', key.api_keys(), now_ms, key_id)
return 1
