-- Take runs from workers: those whose lease is over (lost, counted), or those that a worker hands
-- back (released, no blame). Their jobs go back to their place in the order.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 lost | released, 3 limit, 4 losses after which a job has failed,
--          5 body of that end, 6 exc_string of it for rq's tools, 7 body of a cancelled job's end,
--          8 result ttl s, 9 failure ttl s, then for `released` pairs of job id and token
-- Result   {ids back in the queue, ids that failed}
-- Keeps    a run that was taken is in no place that holds runs; registries hold no member whose
--          time is over.

local by_loss, requeued, failed = ARGV[2] == 'lost', {}, {}

local function put_back(job_id, score)
  redis.call('HSET', key.job(job_id), 'status', 'queued', 'started_at', '', 'worker_name', '',
    'mf_token', '')
  redis.call('ZADD', key.ready(model), score, job_id)
  redis.call('LPUSH', KEYS[1], job_id)
  -- What its readers have must outlive the wait, and yet not a job that rq's tools delete.
  redis.call('EXPIRE', key.channel(job_id), ARGV[9])
  ring()
  requeued[#requeued + 1] = job_id
end

local function fail(job_id)
  redis.call('HSET', key.job(job_id), 'mf_token', '')
  settle(job_id, 'failed', ARGV[5], tonumber(ARGV[9]), tonumber(ARGV[8]))
  record_result(job_id, ARGV[9], 'type', 2, 'exc_string', ARGV[6])
  failed[#failed + 1] = job_id
end

local function take_back(job_id, token)
  local v = job_fields(job_id, 'mf_token', 'status', 'mf_score')
  drop_lease(job_id, token)
  if v[1] ~= token then return end
  if v[2] == 'canceled' then settle_foreign_cancel(job_id, ARGV[7]) end
  if v[2] ~= 'started' then return end
  local losses = 0
  if by_loss then losses = redis.call('HINCRBY', key.job(job_id), 'mf_losses', 1) end
  if by_loss and losses >= tonumber(ARGV[4]) then fail(job_id) else put_back(job_id, v[3]) end
end

if by_loss then
  local over = redis.call('ZRANGEBYSCORE', key.leases(model), '-inf', whole(now_ms),
    'LIMIT', 0, ARGV[3])
  for _, member in ipairs(over) do
    local job_id, token = string.match(member, '^(.*):([^:]*)$')
    -- A stranger's member names no run; left there it would come up again for ever.
    if job_id then take_back(job_id, token) else redis.call('ZREM', key.leases(model), member) end
  end
  for _, registry in ipairs({key.finished(model), key.failed(model), key.canceled(model)}) do
    redis.call('ZREMRANGEBYSCORE', registry, 0, now_s)
  end
else
  -- From the back, so that the list's head ends up in the order given.
  for i = #ARGV - 1, 10, -2 do take_back(ARGV[i], ARGV[i + 1]) end
end
return {requeued, failed}
