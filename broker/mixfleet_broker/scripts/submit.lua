-- Put a job into the queue, once.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 request (msgpack), 4 its sum, 5 queue limit, 6 tenant, 7 class,
--          8 data for rq's tools, 9 description for them, 10 result ttl s, 11 failure ttl s
-- Result   {'queued', rank}          it is in the queue, `rank` jobs before it
--          {'known', rank}           the same job was here already; 0 when it waits no more
--          {'conflict', 0}           the id is taken by a different job
--          {'full', depth}           the queue is at its limit
-- Keeps    all or nothing: refused means that no key was changed.

local job_id, sum = ARGV[2], ARGV[4]
local ready, job = key.ready(model), key.job(job_id)

if redis.call('EXISTS', job) == 1 then
  if redis.call('HGET', job, 'mf_sum') ~= sum then return {'conflict', 0} end
  return {'known', redis.call('ZRANK', ready, job_id) or 0}
end
local depth = redis.call('LLEN', KEYS[1])
if depth >= tonumber(ARGV[5]) then return {'full', depth} end

local score = tonumber(ARGV[7]) * 1e12 + redis.call('INCR', key.sequence(model))
local now = iso_now()
redis.call('HSET', job,
  'status', 'queued', 'origin', model, 'created_at', now, 'enqueued_at', now,
  'data', ARGV[8], 'description', ARGV[9], 'timeout', RUN_TTL_S,
  'result_ttl', ARGV[10], 'failure_ttl', ARGV[11],
  'started_at', '', 'ended_at', '', 'last_heartbeat', '', 'worker_name', '', 'group_id', '',
  'mf_request', ARGV[3], 'mf_sum', sum, 'mf_tenant', ARGV[6], 'mf_score', whole(score),
  'mf_token', '', 'mf_attempt', 0, 'mf_losses', 0)
-- A job of this id may have ended just now and left its channel for its readers.
redis.call('DEL', key.channel(job_id))
redis.call('ZADD', ready, score, job_id)
redis.call('RPUSH', KEYS[1], job_id)
redis.call('SADD', key.queues(), KEYS[1])
ring()
return {'queued', redis.call('ZRANK', ready, job_id)}
