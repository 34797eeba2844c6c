-- Take a batch to drive it, go on with it, or let go of it.
--
-- KEYS[1]  its record (batch)
-- ARGV     1 batch id, 2 the driver's token, 3 ms of the lease; 0: let go
-- Result   {status, ms until its window is over}; {} it is another's, let go of, or has ended
-- Keeps    one driver at a time: who takes a lease that is over puts its token in the place of the
--          other's, which can write nothing from then on.

local batch_id, token, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local until_ms = redis.call('ZSCORE', key.batches_open(), batch_id)
if not until_ms then return {} end
if redis.call('EXISTS', KEYS[1]) == 0 then -- nobody drove it until it was forgotten
  redis.call('ZREM', key.batches_open(), batch_id)
  return {}
end
local is_holder = redis.call('HGET', KEYS[1], 'lease') == token
if lease_ms == 0 then
  if is_holder then
    redis.call('HDEL', KEYS[1], 'lease')
    redis.call('ZADD', key.batches_open(), 0, batch_id)
  end
  return {}
end
if not is_holder and tonumber(until_ms) > now_ms then return {} end
redis.call('HSET', KEYS[1], 'lease', token)
redis.call('ZADD', key.batches_open(), now_ms + lease_ms, batch_id)
local expires_ms = number(redis.call('HGET', KEYS[1], 'expires_ms'), now_ms)
return {redis.call('HGET', KEYS[1], 'status'), expires_ms - now_ms}
