-- uses: files
-- Bring a batch into another status.
--
-- KEYS[1]  its record (batch)
-- ARGV     1 batch id, 2 the driver's token, or empty for its owner, who may only ask for cancelling,
--          3 the status; the rest are field, value, ... of its record
-- Result   the status from now on; nil: there is no such batch, or it is not the caller's any more
-- Keeps    an ended batch stays as it is, has no driver and no marks, and is kept, with its files, for
--          its time. A batch that is to be cancelled never completes.

local batch_id, token, status = ARGV[1], ARGV[2], ARGV[3]
local ENDS = {completed = true, failed = true, cancelled = true, expired = true}
local now_is = redis.call('HGET', KEYS[1], 'status')
if not now_is then return false end
if token == '' then
  if ENDS[now_is] or status ~= 'cancelling' then return now_is end
elseif redis.call('HGET', KEYS[1], 'lease') ~= token then
  return false
end
if #ARGV > 3 then redis.call('HSET', KEYS[1], unpack(ARGV, 4)) end
if now_is == 'cancelling' and not (status == 'cancelled' or status == 'failed') then return now_is end

redis.call('HSET', KEYS[1], 'status', status)
redis.call('HSETNX', KEYS[1], status .. '_ms', whole(now_ms))
if not ENDS[status] then return status end
redis.call('HDEL', KEYS[1], 'lease')
redis.call('ZREM', key.batches_open(), batch_id)
redis.call('DEL', key.batch_done(batch_id))
local ttl_ms = number(redis.call('HGET', KEYS[1], 'ttl_ms'), 1000)
redis.call('PEXPIRE', KEYS[1], ttl_ms)
keep_file(redis.call('HGET', KEYS[1], 'output_file'), ttl_ms)
keep_file(redis.call('HGET', KEYS[1], 'error_file'), ttl_ms)
return status
