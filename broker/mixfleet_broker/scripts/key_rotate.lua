-- Give an API key a new secret.
--
-- KEYS[1]  the key's record (api_key)
-- ARGV     1 key id, 2 digest of the new secret, 3 ms for which the one of now stays valid
-- Result   1 done, also by an earlier call with this secret; 0 there is no such key; -1 it is revoked
-- Keeps    a key has one secret, and for a time the one before; no third opens anything.

local key_id, digest, grace_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if redis.call('HEXISTS', KEYS[1], 'revoked_ms') == 1 then return -1 end
local last, before_last = unpack(redis.call('HMGET', KEYS[1], 'digest', 'old_digest'))
if last == digest then return 1 end

if before_last then redis.call('DEL', key.api_secret(before_last)) end
if grace_ms > 0 then
  redis.call('SET', key.api_secret(last), key_id, 'PX', whole(grace_ms))
  redis.call('HSET', KEYS[1], 'old_digest', last, 'old_until_ms', whole(now_ms + grace_ms))
else
  redis.call('DEL', key.api_secret(last))
  redis.call('HDEL', KEYS[1], 'old_digest', 'old_until_ms')
end
redis.call('SET', key.api_secret(digest), key_id)
redis.call('HSET', KEYS[1], 'digest', digest)
return 1
