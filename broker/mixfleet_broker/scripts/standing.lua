-- uses: outcome rates
-- Where a job stands. Changes nothing.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id
-- Result   false where there is no such job in this queue, else {status, worker, attempt, losses,
--          ms since it was submitted or -1, jobs before it or -1, tokens before it or -1, ms until it starts
--          or -1, workers that take jobs, workers that live, jobs that they take at once, whether rq is
--          suspended, whether it waits to be run alone, its tenant}
-- Keeps    everything as it is.

local job_id = ARGV[2]
local v = job_fields(job_id, 'status', 'worker_name', 'mf_attempt', 'mf_losses', 'mf_at', 'origin', 'mf_tenant')
if not v[1] or v[6] ~= model then return false end
local rank, tokens, eta, alone = -1, -1, -1, 0
if v[1] == 'queued' then
  local place = redis.call('ZRANK', key.ready(model), job_id)
  if place then
    local answers
    rank = place
    tokens, answers = tokens_ahead(rank)
    eta = eta_ms(rank, answers)
  elseif redis.call('ZSCORE', key.suspects(model), job_id) then
    alone = 1
  end
end
local num_workers, num_slots, num_alive = capacity()
local at = count(v[5])
local waited = at and math.max(0, now_ms - at) or -1
return {v[1], v[2] or '', count(v[3], 0), count(v[4], 0), waited, rank, math.floor(tokens), eta,
  num_workers, num_alive, num_slots, redis.call('EXISTS', key.suspended()), alone, v[7] or ''}
