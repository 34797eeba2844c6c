-- End a job from inside: the last chunk, the end and the state are one step, so no next worker
-- can find an answer that is whole and not ended.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 token, 4 run, 5 finished | failed, 6 body of the end,
--          7 body of the last chunk or '', 8 tokens of the answer with it, 9 tokens in it,
--          10 result ttl s, 11 failure ttl s, 12 exc_string for rq's tools or '',
--          13 finish reason or '', 14 prompt tokens, 15 completion tokens
-- Result   1 done, also by an earlier call of this run; 0 the run is not the job's any more;
--          -1 the last chunk does not follow what was delivered, nothing was changed
-- Keeps    a job ends once; its channel holds tokens 1..n once each and one end.

local job_id, token, run, status = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local v = job_fields(job_id, 'mf_token', 'status', 'worker_name', 'mf_request')
if v[1] ~= token then return 0 end
if v[2] == 'finished' or v[2] == 'failed' then return 1 end
if v[2] ~= 'started' then return 0 end

local last_ms, delivered = channel_tail(job_id)
if ARGV[7] ~= '' then
  local num_tokens, num_new = tonumber(ARGV[8]), tonumber(ARGV[9])
  if num_tokens - num_new == delivered then
    -- Text alone, held back until now, adds no token: it needs a new run number to have an id.
    local ms = num_new > 0 and run or whole(run_after(last_ms))
    redis.call('XADD', key.channel(job_id), ms .. '-' .. whole(num_tokens), 'k', 't', 'd', ARGV[7])
  elseif num_tokens ~= delivered then
    return -1
  end -- otherwise the chunk came before, by an append whose reply was lost
end

local BASE64 = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
local function base64(bytes)
  local out = {}
  for i = 1, #bytes, 3 do
    local a, b, c = string.byte(bytes, i, i + 2)
    local bits = a * 65536 + (b or 0) * 256 + (c or 0)
    for shift = 0, 3 do
      local at = math.floor(bits / 64 ^ (3 - shift)) % 64 + 1
      local padding = (shift == 2 and not b) or (shift == 3 and not c)
      out[#out + 1] = padding and '=' or string.sub(BASE64, at, at)
    end
  end
  return table.concat(out)
end

-- The return value for an rq producer, in its JSON serializer.
local function return_value()
  local text = {}
  for _, event in ipairs(redis.call('XRANGE', key.channel(job_id), '-', '+')) do
    local fields = event[2]
    if fields[2] == 't' then text[#text + 1] = cmsgpack.unpack(fields[4]).t end
  end
  return base64(cjson.encode({text = table.concat(text), finish_reason = ARGV[13],
    prompt_tokens = tonumber(ARGV[14]), completion_tokens = tonumber(ARGV[15])}))
end

local worker_id = v[3] or ''
local result = {'type', status == 'finished' and 1 or 2,
  'worker_name', worker_id, 'execution_id', token}
local ttl_s, counter = ARGV[10], 'successful_job_count'
if status == 'failed' then
  ttl_s, counter = ARGV[11], 'failed_job_count'
  result[#result + 1] = 'exc_string'
  result[#result + 1] = ARGV[12]
elseif not v[4] then
  result[#result + 1] = 'return_value'
  result[#result + 1] = return_value()
end
drop_lease(job_id, token)
settle(job_id, status, ARGV[6], tonumber(ttl_s), tonumber(ARGV[10]))
record_result(job_id, ttl_s, unpack(result))
-- Only where the worker is registered: a counter alone would be a key without a time to live.
if redis.call('EXISTS', key.rq_worker(worker_id)) == 1 then
  redis.call('HINCRBY', key.rq_worker(worker_id), counter, 1)
end
return 1
