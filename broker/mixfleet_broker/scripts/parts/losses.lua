-- Runs whose lease is over, jobs whose time is over, and readers that are gone.
-- Needs: order, mirror, outcome.

-- What the limits are; set by each script from its arguments.
local limits = {max_losses = 3, result_ttl_s = 900, failure_ttl_s = 86400}

local requeued = {}

-- Let a job that was started wait again. Its place is where it was, so before all that came later;
-- a suspect has none. The event in its channel fences the run that was going on.
local function put_back(job_id, reason, suspect)
  local v = job_fields(job_id, 'mf_score', 'mf_class', 'mf_cost', 'mf_answer', 'mf_tenant', 'mf_end_by')
  local last_ms, num_tokens = channel_tail(job_id)
  local class = class_of(v[2], 1)
  local entry = {class = class, cost = count(v[3], 0), answer = count(v[4], 0),
    tenant = v[5] or 'default'}
  redis.call('HSET', key.job(job_id), 'status', 'queued', 'started_at', '', 'worker_name', '',
    'mf_token', '')
  -- An idle queue began its tags anew meanwhile: what was taken long ago is not behind what came since.
  local tag = math.max(0, math.min(number(v[1], 0) - class * CLASS, virtual_time(class)))
  enter(job_id, entry, not suspect and class * CLASS + tag or nil)
  if count(v[6]) then redis.call('ZADD', key.deadlines(model), count(v[6]), job_id) end
  list_prepend(job_id)
  say(job_id, last_ms, num_tokens, 'q', cmsgpack.pack({r = reason}))
  -- What its readers have must outlive the wait, and yet not a job that rq's tools delete.
  redis.call('EXPIRE', key.channel(job_id), limits.failure_ttl_s)
  ring()
  requeued[#requeued + 1] = job_id
end

-- Take a run away from its worker. A lost one is blamed on the job: the last run that it may lose is
-- alone, so that a job that kills its workers takes no neighbour with it.
local function take_back(job_id, token, reason)
  local v = job_fields(job_id, 'mf_token', 'status', 'worker_name', 'mf_losses')
  drop_lease(job_id, token)
  if v[1] ~= token then return end
  settle_foreign_end(job_id, v[2])
  if v[2] ~= 'started' then return end
  local _, num_tokens = channel_tail(job_id)
  note_run(job_id, v[3], reason, num_tokens)
  if reason ~= 'lost' then return put_back(job_id, reason, reason == 'isolated') end
  local losses = count(v[4], 0) + 1
  redis.call('HSET', key.job(job_id), 'mf_losses', losses)
  if losses >= limits.max_losses then
    fail(job_id, 'worker_lost', whole(losses) .. ' workers that ran it died',
      limits.result_ttl_s, limits.failure_ttl_s)
  else
    put_back(job_id, reason, losses == limits.max_losses - 1)
  end
end

-- Take the runs whose lease is over from their workers.
local function reap_leases(limit)
  local over = redis.call('ZRANGEBYSCORE', key.leases(model), '-inf', whole(now_ms), 'LIMIT', 0, limit)
  for _, member in ipairs(over) do
    local job_id, token = string.match(member, '^(.*):([^:]*)$')
    -- A stranger's member names no run; left there it would come up again for ever.
    if job_id then
      take_back(job_id, token, 'lost')
    else
      redis.call('ZREM', key.leases(model), member)
    end
  end
end

local function seconds(ms)
  return string.format('%.1f s', ms / 1000)
end

-- End a job whose time is over, wherever it is; `is_out`: it was taken out of all that waits.
local function expire(job_id, is_out)
  local v = job_fields(job_id, 'status', 'mf_token', 'mf_at', 'mf_start_by', 'mf_end_by', 'worker_name')
  redis.call('ZREM', key.deadlines(model), job_id)
  local at, start_by, end_by = count(v[3], now_ms), count(v[4]), count(v[5])
  local message
  if v[1] == 'queued' then
    if not is_out then
      leave(job_id)
      unlist(job_id)
    end
    if end_by and end_by <= now_ms then
      message = 'waited ' .. seconds(now_ms - at) .. ', was to be complete within ' .. seconds(end_by - at)
    else
      message = 'waited ' .. seconds(now_ms - at) .. ', was to start within '
        .. seconds((start_by or now_ms) - at)
    end
  elseif v[1] == 'started' then
    drop_lease(job_id, v[2] or '')
    tell_worker(v[6], 'c:' .. job_id .. ':' .. (v[2] or ''))
    message = 'was to be complete within ' .. seconds((end_by or now_ms) - at)
  else
    return
  end
  fail(job_id, 'deadline_exceeded', message, limits.result_ttl_s, limits.failure_ttl_s)
end

local function expire_due(limit)
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', key.deadlines(model), '-inf', whole(now_ms),
    'LIMIT', 0, limit)) do
    expire(job_id)
  end
end

-- Whether a job that is to end with its reader has missed it twice in a row: after an outage of
-- Redis the reader's key may be over, and the reader back in a moment.
local function reader_is_gone(job_id, attended)
  if not attended or attended == '' then return false end
  local here = redis.call('EXISTS', key.reader(job_id)) == 1
  if attended == (here and '1' or '2') then return not here end
  redis.call('HSET', key.job(job_id), 'mf_attended', here and '1' or '2')
  return false
end

local function cancel_unread(job_id)
  redis.call('HSET', key.job(job_id), 'mf_token', '')
  settle(job_id, 'canceled', cancel_body('its reader is gone'), CANCELED_TTL_S, CANCELED_TTL_S)
end
