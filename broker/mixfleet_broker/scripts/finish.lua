-- uses: privileged outcome rates
-- End a job from inside: the last chunk, the end and the state are one step, so no next worker
-- can find an answer that is whole and not ended.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 token, 4 run, 5 finished | failed, 6 body of the end,
--          7 body of the last chunk or '', 8 tokens of the answer with it, 9 tokens in it,
--          10 result ttl s, 11 failure ttl s, 12 finish reason or '', 13 prompt tokens,
--          14 completion tokens
-- Result   DONE, also by an earlier call of this run; LOST, the run is not the job's any more; or how
--          many tokens were delivered, which the last chunk does not follow: nothing was changed
-- Keeps    a job ends once; its channel holds tokens 1..n once each and one end.

local job_id, token, run, status = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local v = job_fields(job_id, 'mf_token', 'status', 'worker_name', 'mf_request', 'mf_attempt', 'mf_bytes',
  'mf_tenant', 'mf_class', 'mf_cost', 'mf_max')
if v[1] ~= token then return LOST end
local last_ms, delivered, is_ended = channel_tail(job_id)
if (v[2] == 'finished' or v[2] == 'failed') and is_ended then return DONE end
if v[2] ~= 'started' then
  settle_foreign_end(job_id, v[2])
  return LOST
end

if ARGV[7] ~= '' then
  local num_tokens, num_new = tonumber(ARGV[8]), tonumber(ARGV[9])
  if num_tokens - num_new == delivered then
    -- Text alone, held back until now, adds no token: it needs a new run number to have an id.
    local ms = num_new > 0 and run or whole(run_after(last_ms))
    redis.call('XADD', key.channel(job_id), ms .. '-' .. whole(num_tokens), 'k', 't', 'd', ARGV[7])
  elseif num_tokens ~= delivered then
    return delivered
  end -- otherwise the chunk came before, by an append whose reply was lost
end

-- The return value for an rq producer, in its JSON serializer.
local function return_value()
  local text = {}
  for _, event in ipairs(redis.call('XRANGE', key.channel(job_id), '-', '+')) do
    local fields = event[2]
    if fields[2] == 't' then text[#text + 1] = cmsgpack.unpack(fields[4]).t end
  end
  return base64(cjson.encode({text = table.concat(text), finish_reason = ARGV[12],
    prompt_tokens = tonumber(ARGV[13]), completion_tokens = tonumber(ARGV[14])}))
end

-- What the tenant was charged was a guess: put right what its next job pays.
local function correct_charge(num_tokens)
  local tenant, class, cost = v[7], count(v[8]), count(v[9])
  if not (tenant and class and cost) then return end
  local tags = key.tags(model, class)
  local tag = redis.call('ZSCORE', tags, tenant)
  if not tag then return end
  local weight = number(redis.call('HGET', key.weights(), tenant), 1)
  redis.call('ZADD', tags, math.max(0, tag + (num_tokens - cost) / weight), tenant)
end

local function learn_from_this()
  local prompt_tokens, answer_tokens = tonumber(ARGV[13]), tonumber(ARGV[14])
  correct_charge(prompt_tokens + answer_tokens)
  -- A run that went on with another's answer says nothing of how long one takes.
  if v[5] ~= '1' then return end
  -- As it would be expected now: what was expected when it came belongs to another time.
  local expected, max_tokens = rate('answer_tokens') or answer_tokens, count(v[10], 0)
  if max_tokens > 0 then expected = math.min(expected, max_tokens) end
  local samples = {service_ms = math.max(1, now_ms - tonumber(run)), answer_tokens = answer_tokens,
    expected_tokens = expected}
  local bytes = count(v[6])
  if bytes and bytes > 0 and prompt_tokens > 0 then samples.bytes_per_token = bytes / prompt_tokens end
  learn(samples)
end

local worker_id = v[3] or ''
local is_stock = not v[4]
local ttl_s, counter = ARGV[10], 'successful_job_count'
drop_lease(job_id, token)
if status == 'failed' then
  ttl_s, counter = ARGV[11], 'failed_job_count'
  note_run(job_id, worker_id, 'failed', tonumber(ARGV[8]))
  local said = cmsgpack.unpack(ARGV[6])
  record_result(job_id, ttl_s, 'type', 2, 'worker_name', worker_id, 'execution_id', token,
    'exc_string', exc_string(said.c .. ': ' .. (said.m or '')))
elseif is_stock then
  record_result(job_id, ttl_s, 'type', 1, 'worker_name', worker_id, 'execution_id', token,
    'return_value', return_value())
else
  -- The answer is in the channel; a result of rq's that says nothing would cost a stream.
  redis.call('DEL', key.results(job_id))
end
settle(job_id, status, ARGV[6], tonumber(ttl_s), tonumber(ARGV[10]))
if status == 'finished' then learn_from_this() end
-- Only where the worker is registered: a counter alone would be a key without a time to live.
if redis.call('EXISTS', key.rq_worker(worker_id)) == 1 then
  redis.call('HINCRBY', key.rq_worker(worker_id), counter, 1)
end
return DONE
