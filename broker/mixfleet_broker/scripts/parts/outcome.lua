-- How a run stops and how a job ends: its channel, its lease, its state, its registry.

local CANCELED_TTL_S = 300
local FAILED_TTL_S = 86400 -- where a stranger failed it
-- As readers of the channel accept them; ms of the clock have 13.
local MAX_RUN_DIGITS = 15
local MAX_HISTORY = 16
-- What became of a worker's write; any other reply is how many tokens its channel has.
local DONE, LOST = -1, -2

-- Ends that this call brought about, for the log of the caller: {job id, status, code, message}.
local ended = {}

-- Where a job's channel ends: ms of the last id, tokens delivered, whether the end is said.
local function channel_tail(job_id)
  local last = redis.pcall('XREVRANGE', key.channel(job_id), '+', '-', 'COUNT', 1)
  if last.err then -- a key of another type in the place of the channel
    redis.call('DEL', key.channel(job_id))
    return 0, 0, false
  end
  if not last[1] then return 0, 0, false end
  local ms, num_tokens = string.match(last[1][1], '^(%d+)%-(%d+)$')
  if #ms > MAX_RUN_DIGITS then -- no run of ours, and nothing can be said after it
    redis.call('DEL', key.channel(job_id))
    return 0, 0, false
  end
  return tonumber(ms), tonumber(num_tokens), last[1][2][2] == 'e'
end

-- A run number above the clock and above all in the channel: it fences every earlier run, also
-- when a failover has forgotten the claim that made it.
local function run_after(last_ms)
  return math.max(now_ms, last_ms + 1)
end

-- Say something after all that was said, under a new run number: it fences the run that was going on.
local function say(job_id, last_ms, num_tokens, kind, body)
  redis.call('XADD', key.channel(job_id), whole(run_after(last_ms)) .. '-' .. whole(num_tokens),
    'k', kind, 'd', body)
end

-- Say the end, once.
local function say_end(job_id, body, ttl_s)
  local last_ms, num_tokens, is_ended = channel_tail(job_id)
  if not is_ended then say(job_id, last_ms, num_tokens, 'e', body) end
  redis.call('EXPIRE', key.channel(job_id), ttl_s)
end

-- Take a run out of all places that hold runs; harmless where it is in none of them.
local function drop_lease(job_id, token)
  local member = job_id .. ':' .. token
  local execution = key.execution(job_id, token)
  local worker_id = redis.call('HGET', execution, 'worker_name')
  redis.call('ZREM', key.leases(model), member)
  redis.call('ZREM', key.wip(model), member)
  redis.call('ZREM', key.executions(job_id), token)
  redis.call('DEL', execution)
  if worker_id then redis.call('SREM', key.worker_executions(worker_id), member) end
end

-- Note how a run came to its end, in the job's hash: it outlives the channel.
local function note_run(job_id, worker_id, reason, num_tokens)
  local known = redis.call('HGET', key.job(job_id), 'mf_history')
  local is_legible, history = pcall(cmsgpack.unpack, known or '')
  if not is_legible or type(history) ~= 'table' then history = {} end
  history[#history + 1] = {w = worker_id or '', t = now_ms, r = reason, n = num_tokens}
  if #history > MAX_HISTORY then table.remove(history, 1) end
  redis.call('HSET', key.job(job_id), 'mf_history', cmsgpack.pack(history))
end

-- A job whose answer is a stored response is kept as long as that one; 0 s: it is none.
local MAX_KEEP_S = 3650 * 86400
local LONGEST_WAIT_S = 31 * 86400 -- longer than any job may take
local function kept_s(job_id)
  return math.min(MAX_KEEP_S, count(job_fields(job_id, 'mf_keep')[1], 0))
end

-- Let the stored response of a job that is queued outlive its waiting; its time begins at the end.
local function hold_response(job_id)
  local keep_s = kept_s(job_id)
  if keep_s > 0 then redis.call('EXPIRE', key.response(job_id), whole(keep_s + LONGEST_WAIT_S)) end
end

-- End a job: its state, its registry, its times to live and its last event.
local function settle(job_id, status, body, ttl_s, channel_ttl_s)
  local said, keep_s = cmsgpack.unpack(body), kept_s(job_id)
  if keep_s > 0 then
    ttl_s, channel_ttl_s = math.max(ttl_s, keep_s), math.max(channel_ttl_s, keep_s)
    redis.call('EXPIRE', key.response(job_id), whole(keep_s))
  end
  redis.call('HSET', key.job(job_id), 'status', status, 'ended_at', iso_now(),
    'mf_reason', said.c or said.r or '', 'mf_message', said.m or '')
  redis.call('HDEL', key.job(job_id), 'mf_place')
  redis.call('EXPIRE', key.job(job_id), ttl_s)
  redis.call('ZADD', key[status](model), now_s + ttl_s, job_id)
  redis.call('ZREM', key.deadlines(model), job_id)
  redis.call('DEL', key.reader(job_id))
  say_end(job_id, body, channel_ttl_s)
  ended[#ended + 1] = {job_id, status, said.c or said.r or '', said.m or ''}
end

local function cancel_body(message)
  return cmsgpack.pack({s = 'canceled', m = message})
end

-- rq's own tools and workers know nothing of channels, and a cancel of theirs sets no time to live:
-- make up for it where they have ended a job.
local function settle_foreign_end(job_id, status)
  if status ~= 'canceled' and status ~= 'failed' then return end
  local _, _, is_ended = channel_tail(job_id)
  if is_ended then return end
  if status == 'canceled' then
    settle(job_id, status, cancel_body("cancelled with rq's tools"), CANCELED_TTL_S, CANCELED_TTL_S)
  else
    local body = cmsgpack.pack({s = status, c = 'failed', m = "rq's own worker or tools failed it"})
    settle(job_id, status, body, FAILED_TTL_S, FAILED_TTL_S)
  end
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

-- A reason as rq's tools read it: zlib (RFC 1950, one stored block) in base 64.
local function exc_string(text)
  text = string.sub(text, 1, 60000) -- what one block holds; reasons are far shorter
  local a, b = 1, 0
  for i = 1, #text do
    a = (a + string.byte(text, i)) % 65521
    b = (b + a) % 65521
  end
  local n = #text
  return base64(string.char(0x78, 0x01, 0x01, n % 256, math.floor(n / 256), 255 - n % 256,
    255 - math.floor(n / 256)) .. text
    .. string.char(math.floor(b / 256), b % 256, math.floor(a / 256), a % 256))
end

-- What rq's tools show of an outcome.
local function record_result(job_id, ttl_s, ...)
  redis.call('XADD', key.results(job_id), 'MAXLEN', 10, '*', ...)
  redis.call('EXPIRE', key.results(job_id), ttl_s)
end

-- End a job that has failed without its worker saying so.
local function fail(job_id, code, message, result_ttl_s, failure_ttl_s)
  redis.call('HSET', key.job(job_id), 'mf_token', '')
  settle(job_id, 'failed', cmsgpack.pack({s = 'failed', c = code, m = message}),
    tonumber(failure_ttl_s), tonumber(result_ttl_s))
  record_result(job_id, failure_ttl_s, 'type', 2, 'exc_string', exc_string(code .. ': ' .. message))
end

-- Tell a worker at its next step that a run is not its own any more.
local function tell_worker(worker_id, word)
  if worker_id and worker_id ~= '' and redis.call('EXISTS', key.worker(worker_id)) == 1 then
    redis.call('RPUSH', key.control(worker_id), word)
    redis.call('EXPIRE', key.control(worker_id), 60)
  end
end
