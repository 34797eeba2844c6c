-- uses: privileged outcome order mirror losses
-- Extend a worker's leases and tell it which of its runs are not its own any more.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 worker id, 3 lease ms, then pairs of job id and token
-- Result   {job ids that are lost: cancelled, reaped, ended or gone; ends as of claim}
-- Keeps    a run that is told to be lost is in no place that holds runs; a job whose reader is to be
--          there and is gone ends here.

local lease_ms, lost, now = tonumber(ARGV[3]), {}, iso_now()

local function extend(job_id, token)
  local member = job_id .. ':' .. token
  -- Not XX: the hash is the truth, so a lease that went astray is made again.
  redis.call('ZADD', key.leases(model), now_ms + lease_ms, member)
  redis.call('ZADD', key.wip(model), now_s + WIP_AHEAD_S, member)
  redis.call('HSET', key.job(job_id), 'last_heartbeat', now)
  redis.call('HSET', key.execution(job_id, token), 'last_heartbeat', now_s)
  redis.call('EXPIRE', key.execution(job_id, token), RUN_TTL_S)
  redis.call('EXPIRE', key.executions(job_id), RUN_TTL_S)
  redis.call('EXPIRE', key.channel(job_id), RUN_TTL_S)
end

for i = 4, #ARGV, 2 do
  local job_id, token = ARGV[i], ARGV[i + 1]
  local v = job_fields(job_id, 'mf_token', 'status', 'mf_attended')
  local mine = v[1] == token and v[2] == 'started'
  if mine and not reader_is_gone(job_id, v[3]) then
    extend(job_id, token)
  else
    lost[#lost + 1] = job_id
    drop_lease(job_id, token)
    if mine then
      cancel_unread(job_id)
    elseif v[1] == token then
      settle_foreign_end(job_id, v[2])
    end
  end
end
redis.call('EXPIRE', key.worker_executions(ARGV[2]), RUN_TTL_S)
return {lost, ended}
