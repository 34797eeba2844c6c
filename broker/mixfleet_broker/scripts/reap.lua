-- uses: privileged outcome order mirror losses
-- House-keeping that anybody may do and somebody must (mode `lost`), or a worker hands runs back.
--
-- `lost`: take runs whose lease is over from their workers, end jobs whose time is over, let jobs
-- that waited for long move up, sweep out what is over. `released`: runs that a worker does not
-- finish, no blame. `isolated`: runs among which the engine failed, each to be run alone, no blame.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 lost | released | isolated, 3 limit of each kind of work, 4 losses after which
--          a job has failed, 5 result ttl s, 6 failure ttl s, 7 ms after which a job moves up a
--          class, then for released and isolated pairs of job id and token
-- Result   {ids back in the queue, ends as of claim}
-- Keeps    a run that was taken is in no place that holds runs; registries hold no member whose
--          time is over; what waits and what is counted as waiting are the same.

local TRIMMED = 5000 -- members of a registry at a time: 100,000 at once take 60 ms
local mode, limit = ARGV[2], tonumber(ARGV[3])
limits = {max_losses = tonumber(ARGV[4]), result_ttl_s = ARGV[5], failure_ttl_s = ARGV[6]}

-- Whoever is counted as waiting and waits nowhere was removed by somebody who does not count: a few
-- are looked at each time.
local function recount()
  local sample = redis.call('HRANDFIELD', key.waiting(model), 8)
  for _, job_id in ipairs(sample) do
    if not redis.call('ZSCORE', key.ready(model), job_id)
      and not redis.call('ZSCORE', key.suspects(model), job_id) then
      leave(job_id)
    end
  end
end

local function forget_the_gone()
  local entries = redis.call('HGETALL', key.capacity(model))
  for i = 1, #entries, 2 do
    local until_ms = string.match(entries[i + 1], ' (%d+)$')
    if not until_ms or tonumber(until_ms) < now_ms then
      redis.call('HDEL', key.capacity(model), entries[i])
    end
  end
  for _, registry in ipairs({key.finished(model), key.failed(model), key.canceled(model)}) do
    local over = redis.call('ZRANGEBYSCORE', registry, 0, now_s, 'LIMIT', 0, TRIMMED)
    if #over > 0 then redis.call('ZREM', registry, unpack(over)) end
  end
end

if mode == 'lost' then
  reap_leases(limit)
  expire_due(limit)
  move_up(ARGV[7], limit)
  sweep_list(limit)
  recount()
  forget_the_gone()
else
  -- From the back, so that the list's head ends up in the order given.
  for i = #ARGV - 1, 8, -2 do take_back(ARGV[i], ARGV[i + 1], mode) end
end
return {requeued, ended}
