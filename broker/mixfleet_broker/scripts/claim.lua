-- Give a worker up to n jobs, first in the order first.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 worker id, 3 n, 4 lease ms, 5 claim token, 6 body of the run's first event,
--          7 body of a cancelled job's end, 8 class of jobs that rq producers enqueued
-- Result   a list of {job id, token, run, tokens delivered, attempt, losses, from rq (0/1),
--          request (msgpack), or rq's data}
-- Keeps    a repeated claim token gives the jobs of the first call that it still holds, and no
--          others, so a lost reply loses nothing; whatever is in the list or in `ready` and
--          cannot be claimed leaves both.

local INBOX_SCAN = 256 -- how far from either end of the list a foreign job is looked for
local worker_id, claim_token = ARGV[2], ARGV[5]
local max_jobs, lease_ms, stock_class = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[8])
local ready, leases = key.ready(model), key.leases(model)
local claim = key.claim(model, worker_id, claim_token)
local claimed, members = {}, {}

local function give(job_id, token, run, num_tokens)
  local v = job_fields(job_id, 'mf_attempt', 'mf_losses', 'mf_request', 'data')
  claimed[#claimed + 1] = {job_id, token, run, num_tokens, tonumber(v[1]), tonumber(v[2]),
    v[3] and 0 or 1, v[3] or v[4]}
end

local function give_again()
  for _, member in ipairs(redis.call('LRANGE', claim, 0, -1)) do
    local job_id, token = string.match(member, '^(.*):([^:]*)$')
    local v = job_fields(job_id, 'mf_token', 'status')
    if v[1] == token and v[2] == 'started' then
      local _, num_tokens = channel_tail(job_id)
      give(job_id, token, string.match(token, '(%d+)$'), num_tokens)
    end
  end
end

-- Jobs that rq producers pushed are in the list only: give them a place behind all others.
local function index_inbox()
  local depth = redis.call('LLEN', KEYS[1])
  if depth <= redis.call('ZCARD', ready) then return end
  local function index(first, last)
    for _, job_id in ipairs(redis.call('LRANGE', KEYS[1], first, last)) do
      if not redis.call('ZSCORE', ready, job_id) then
        local place = redis.call('INCR', key.sequence(model))
        redis.call('ZADD', ready, stock_class * 1e12 + place, job_id)
      end
    end
  end
  index(0, INBOX_SCAN - 1)
  if depth > INBOX_SCAN then index(-INBOX_SCAN, -1) end
end

local function start(job_id, score, fields)
  local last_ms, num_tokens, ended = channel_tail(job_id)
  local losses = tonumber(fields[5]) or 0
  if ended or last_ms == 0 then
    -- A new job, or one that had ended and that an operator requeued: it begins from nothing.
    redis.call('DEL', key.channel(job_id))
    num_tokens, losses = 0, 0
  end
  local run = whole(run_after(last_ms))
  local token, job, now = claim_token .. '-' .. run, key.job(job_id), iso_now()
  local member = job_id .. ':' .. token
  reclaim(key.executions(job_id), 'zset')
  -- What rq's tools would call or unpickle, and what would make them retry.
  redis.call('HDEL', job, 'meta', 'result', 'webhooks', 'success_callback_name',
    'failure_callback_name', 'stopped_callback_name', 'retries_left', 'repeats_left')
  redis.call('HSET', job, 'status', 'started', 'started_at', now, 'last_heartbeat', now,
    'ended_at', '', 'worker_name', worker_id, 'mf_token', token, 'mf_score', score,
    'mf_attempt', (tonumber(fields[4]) or 0) + 1, 'mf_losses', losses)
  -- At once: whatever fails from here on, the lease ends and the job comes back.
  redis.call('ZADD', leases, now_ms + lease_ms, member)
  redis.call('PERSIST', job)
  redis.call('HSET', key.execution(job_id, token), 'id', token, 'job_id', job_id,
    'created_at', now_s, 'last_heartbeat', now_s, 'worker_name', worker_id)
  redis.call('EXPIRE', key.execution(job_id, token), RUN_TTL_S)
  redis.call('ZADD', key.executions(job_id), now_s + WIP_AHEAD_S, token)
  redis.call('EXPIRE', key.executions(job_id), RUN_TTL_S)
  redis.call('SADD', key.worker_executions(worker_id), member)
  redis.call('EXPIRE', key.worker_executions(worker_id), RUN_TTL_S)
  redis.call('ZADD', key.wip(model), now_s + WIP_AHEAD_S, member)
  redis.call('ZREM', key.failed(model), job_id)
  redis.call('XADD', key.channel(job_id), run .. '-' .. whole(num_tokens), 'k', 'a', 'd', ARGV[6])
  redis.call('EXPIRE', key.channel(job_id), RUN_TTL_S)
  members[#members + 1] = member
  give(job_id, token, run, num_tokens)
end

local function take(job_id, score)
  redis.call('LREM', KEYS[1], 1, job_id)
  -- rq itself makes no other ids; a stranger's would only break those who read it.
  if #job_id > 128 or not string.match(job_id, '^[%w_%-]+$') then return end
  local v = job_fields(job_id, 'status', 'mf_request', 'data', 'mf_attempt', 'mf_losses')
  if v[1] == 'queued' and (v[2] or v[3]) then
    start(job_id, score, v)
  elseif v[1] == 'canceled' then
    settle_foreign_cancel(job_id, ARGV[7])
  end
end

if redis.call('EXISTS', claim) == 1 then
  give_again()
  return claimed
end
if redis.call('EXISTS', key.suspended()) == 1 then return claimed end

index_inbox()
while #claimed < max_jobs do
  local popped = redis.call('ZPOPMIN', ready, max_jobs - #claimed)
  if #popped == 0 then break end
  for i = 1, #popped, 2 do take(popped[i], popped[i + 1]) end
end
if #members > 0 then
  redis.call('RPUSH', claim, unpack(members))
  redis.call('PEXPIRE', claim, 2 * lease_ms)
end
if redis.call('ZCARD', ready) == 0 and redis.call('LLEN', KEYS[1]) == 0 then
  redis.call('DEL', key.bell(model))
else
  ring()
end
return claimed
