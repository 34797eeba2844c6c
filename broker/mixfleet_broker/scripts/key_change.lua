-- Change terms of an API key.
--
-- KEYS[1]  the key's record (api_key)
-- ARGV     1 key id, 2 ms that it lives from now on, -1 for ever, -2 as it was; the rest are
--          field, value, ... of its terms
-- Result   1 changed; 0 there is no such key; -1 it is revoked
-- Keeps    a key that is gone or revoked stays so.

local life_ms = tonumber(ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if redis.call('HEXISTS', KEYS[1], 'revoked_ms') == 1 then return -1 end
if life_ms > -2 then
  redis.call('HSET', KEYS[1], 'expires_ms', life_ms >= 0 and whole(now_ms + life_ms) or '')
end
if #ARGV > 2 then redis.call('HSET', KEYS[1], unpack(ARGV, 3)) end
return 1
