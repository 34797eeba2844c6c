-- uses: privileged
-- A worker says that it lives, in our registry and in rq's; the dead are taken out of the lists.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 worker id, 3 ms until the worker counts as gone, 4 ms until a model that
--          nobody serves is forgotten, 5 birth as rq writes it, 6 jobs that it takes at once, 0 while it
--          takes none, 7 number of the following that are field, value, ... of our record; the rest
--          are field, value, ... of rq's
-- Result   what an operator told it to do: pause, drain, or false
-- Keeps    both records of a worker go at the same moment; a worker that starts anew under an old
--          name starts with rq's counters at 0.

local worker_id, ttl_ms, birth = ARGV[2], tonumber(ARGV[3]), ARGV[5]
local last_of_ours = 7 + tonumber(ARGV[7])
local ours, rqs = key.worker(worker_id), key.rq_worker(worker_id)

redis.call('HSET', ours, unpack(ARGV, 8, last_of_ours))
redis.call('PEXPIRE', ours, ttl_ms)
redis.call('HSET', key.capacity(model), worker_id, ARGV[6] .. ' ' .. whole(now_ms + ttl_ms))
redis.call('EXPIRE', key.capacity(model), 86400)

if redis.call('HGET', rqs, 'birth') ~= birth then
  redis.call('DEL', rqs)
  redis.call('HSET', rqs, 'birth', birth, 'successful_job_count', 0, 'failed_job_count', 0,
    'total_working_time', 0)
end
redis.call('HSET', rqs, 'queues', model, 'last_heartbeat', iso_now(), unpack(ARGV, last_of_ours + 1))
redis.call('PEXPIRE', rqs, ttl_ms)
redis.call('SADD', key.rq_workers(), rqs)
redis.call('SADD', key.rq_queue_workers(model), rqs)

redis.call('ZADD', key.workers(), now_ms, worker_id)
redis.call('ZADD', key.models(), now_ms, model)
redis.call('ZREMRANGEBYSCORE', key.models(), '-inf', now_ms - tonumber(ARGV[4]))

-- A worker of another lease time may be silent for longer than we may: its record decides.
for _, silent in ipairs(redis.call('ZRANGEBYSCORE', key.workers(), '-inf', now_ms - ttl_ms)) do
  if redis.call('EXISTS', key.worker(silent)) == 0 then
    redis.call('ZREM', key.workers(), silent)
    redis.call('SREM', key.rq_workers(), key.rq_worker(silent))
    for _, served in ipairs(redis.call('ZRANGE', key.models(), 0, -1)) do
      redis.call('SREM', key.rq_queue_workers(served), key.rq_worker(silent))
    end
  end
end
-- An order lives as long as its worker.
redis.call('PEXPIRE', key.order(worker_id), ttl_ms)
return redis.call('GET', key.order(worker_id))
