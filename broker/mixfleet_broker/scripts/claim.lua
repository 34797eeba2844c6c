-- uses: privileged outcome order mirror losses
-- Give a worker up to n jobs, first in the order first.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 worker id, 3 n, 4 lease ms, 5 claim token, 6 body of the run's first event,
--          7 whether the worker has no job now (1 or 0), 8 losses after which a job has failed,
--          9 result ttl s, 10 failure ttl s, 11 ms after which a job moves up a class,
--          12 class of jobs that rq producers enqueued, 13 tenant of them, 14 tokens expected of them,
--          15 whether runs whose lease is over are taken from their workers (1 or 0)
-- Result   {jobs, ends}: jobs a list of {job id, token, run, tokens delivered, attempt, losses, from rq
--          (0/1), request (msgpack) or rq's data, alone (0/1), ms until it must be complete or -1};
--          ends a list of {job id, status, code, message} of jobs that ended instead
-- Keeps    a repeated claim token gives the jobs of the first call that it still holds, and no
--          others, so a lost reply loses nothing; whatever is in the list or in `ready` and
--          cannot be claimed leaves both; a suspect is given alone, to a worker that has nothing.

local INBOX_SCAN = 256 -- how far from either end of the list a foreign job is looked for
local LIMIT = 16       -- of others' business that one claim minds
local worker_id, claim_token, idle = ARGV[2], ARGV[5], ARGV[7] == '1'
local max_jobs, lease_ms = tonumber(ARGV[3]), tonumber(ARGV[4])
limits = {max_losses = tonumber(ARGV[8]), result_ttl_s = ARGV[9], failure_ttl_s = ARGV[10]}
local stock_class, stock_tenant, stock_tokens = tonumber(ARGV[12]), ARGV[13], tonumber(ARGV[14])
local ready, leases = key.ready(model), key.leases(model)
local claim = key.claim(model, worker_id, claim_token)
local claimed, members = {}, {}

local function give(job_id, token, run, num_tokens)
  local v = job_fields(job_id, 'mf_attempt', 'mf_losses', 'mf_request', 'data', 'mf_solo', 'mf_end_by')
  local end_by = count(v[6])
  claimed[#claimed + 1] = {job_id, token, run, num_tokens, count(v[1], 1), count(v[2], 0),
    v[3] and 0 or 1, v[3] or v[4], v[5] == '1' and 1 or 0, end_by and math.max(0, end_by - now_ms) or -1}
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

-- A job of an rq producer, or one that an operator requeued with rq's tools.
local function enter_foreign(job_id, place)
  local v = job_fields(job_id, 'mf_class', 'mf_cost', 'mf_answer', 'mf_tenant', 'status')
  local entry = {class = class_of(v[1], stock_class), cost = count(v[2], stock_tokens),
    answer = count(v[3], stock_tokens), tenant = v[4] or stock_tenant}
  local score = next_score(entry.class, entry.tenant, entry.cost)
  enter(job_id, entry, score)
  if v[5] == 'queued' then
    redis.call('HSET', key.job(job_id), 'mf_place', whole(place), 'mf_class', entry.class,
      'mf_cost', entry.cost, 'mf_answer', entry.answer, 'mf_tenant', entry.tenant,
      'mf_score', whole(score))
    redis.call('HSETNX', key.job(job_id), 'mf_at', whole(now_ms))
    -- rq's producers write the whole call into it, and rq's tools show it.
    redis.call('HSET', key.job(job_id), 'description', 'chat')
  end
end

-- Such jobs are in the list only: let them wait with the others.
local function index_inbox()
  local depth = redis.call('LLEN', KEYS[1])
  local known = redis.call('ZCARD', ready) + redis.call('ZCARD', key.suspects(model))
    + redis.call('SCARD', key.unlisted(model))
  if depth <= known then return end
  local base = list_base()
  local function index(first, last, offset)
    for i, job_id in ipairs(redis.call('LRANGE', KEYS[1], first, last)) do
      if not redis.call('ZSCORE', ready, job_id)
        and not redis.call('ZSCORE', key.suspects(model), job_id)
        and redis.call('SISMEMBER', key.unlisted(model), job_id) == 0 then
        leave(job_id) -- where somebody deleted the order, it is still counted
        enter_foreign(job_id, base + offset + i - 1)
      end
    end
  end
  index(0, INBOX_SCAN - 1, 0)
  if depth > INBOX_SCAN then index(-INBOX_SCAN, -1, depth - INBOX_SCAN) end
end

local function start(job_id, fields, alone)
  local last_ms, num_tokens, is_ended = channel_tail(job_id)
  local losses = count(fields[5], 0)
  if is_ended or last_ms == 0 then
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
    'failure_callback_name', 'stopped_callback_name', 'retries_left', 'repeats_left', 'mf_place')
  redis.call('HSET', job, 'status', 'started', 'started_at', now, 'last_heartbeat', now,
    'ended_at', '', 'worker_name', worker_id, 'mf_token', token, 'mf_solo', alone and '1' or '',
    'mf_attempt', count(fields[4], 0) + 1, 'mf_losses', losses)
  -- At once: whatever fails from here on, the lease ends and the job comes back.
  redis.call('ZADD', leases, now_ms + lease_ms, member)
  redis.call('PERSIST', job)
  -- Its worker ends it on time; this is for one that does not.
  local end_by = count(fields[6])
  if end_by then redis.call('ZADD', key.deadlines(model), end_by + lease_ms, job_id) end
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

local function take(job_id, alone)
  leave(job_id)
  list_remove(job_id)
  -- rq itself makes no other ids; a stranger's would only break those who read it.
  if #job_id > 128 or not string.match(job_id, '^[%w_%-]+$') then return end
  local v = job_fields(job_id, 'status', 'mf_request', 'data', 'mf_attempt', 'mf_losses', 'mf_end_by',
    'mf_start_by', 'mf_attended', 'mf_token')
  local start_by = count(v[7])
  -- A worker of rq's own that died on a job of ours leaves it started, and held by nobody.
  local is_orphan = v[1] == 'started' and v[2] and (v[9] or '') == ''
  if v[1] ~= 'queued' and not is_orphan then
    settle_foreign_end(job_id, v[1])
  elseif not (v[2] or v[3]) then
    return
  elseif count(v[6], math.huge) <= now_ms
    or (start_by and start_by <= now_ms and count(v[4], 0) == 0) then
    expire(job_id, true)
  elseif reader_is_gone(job_id, v[8]) then
    cancel_unread(job_id)
  else
    start(job_id, v, alone)
  end
end

-- A suspect goes to a worker that has nothing else. Where none comes by, one worker takes no more
-- jobs until it has none; the others go on. Returns whether this worker gets no others now.
local function mind_suspects()
  if redis.call('EXISTS', key.suspects(model)) == 0 then return false end
  local quarantine = key.quarantine(model)
  local holder = redis.call('GET', quarantine)
  if not idle and holder and holder ~= worker_id then return false end
  redis.call('SET', quarantine, worker_id, 'PX', 2 * lease_ms)
  while idle and #claimed == 0 do
    local first = redis.call('ZPOPMIN', key.suspects(model))
    if #first == 0 then
      redis.call('DEL', quarantine)
      return false
    end
    take(first[1], true)
  end
  return true
end

local function take_in_order()
  while #claimed < max_jobs do
    local popped = redis.call('ZPOPMIN', ready, max_jobs - #claimed)
    if #popped == 0 then return end
    for i = 1, #popped, 2 do
      local class = math.floor(popped[i + 1] / CLASS)
      if class >= 0 and class < NUM_CLASSES then advance(class, popped[i + 1] - class * CLASS) end
      take(popped[i], false)
    end
  end
end

if redis.call('EXISTS', claim) == 1 then
  give_again()
  return {claimed, ended}
end
if ARGV[15] == '1' then reap_leases(LIMIT) end
expire_due(LIMIT)
if redis.call('EXISTS', key.suspended(), key.order(worker_id)) > 0 then return {claimed, ended} end

move_up(ARGV[11], LIMIT)
sweep_list(LIMIT)
index_inbox()
if not mind_suspects() then take_in_order() end
forget_tags_if_idle()
if #members > 0 then
  redis.call('RPUSH', claim, unpack(members))
  redis.call('PEXPIRE', claim, 2 * lease_ms)
end
if redis.call('EXISTS', ready, key.suspects(model), KEYS[1]) == 0 then
  redis.call('DEL', key.bell(model))
else
  ring()
end
return {claimed, ended}
