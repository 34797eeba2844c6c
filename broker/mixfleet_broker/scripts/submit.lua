-- uses: outcome order mirror rates
-- Put a job into the queue, once.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 request (msgpack), 4 its sum, 5 most jobs waiting, 6 most tokens
--          waiting, 7 tenant, 8 most jobs of it, 9 most tokens of it, 10 class, 11 bytes of the
--          prompt, 12 most tokens of the answer or 0, 13 ms within which it is to start or 0, 14 ms
--          within which it is to be complete or 0, 15 ms of a reader's silence that end it or 0,
--          16 data for rq's tools, 17 description for them, 18 result ttl s, 19 failure ttl s,
--          20 ms after which a job moves up a class, 21 s for which its end and its stored response are
--          kept at least, 0 without one
-- Result   {'queued', rank}            it is in the queue, `rank` jobs before it
--          {'known', rank}             the same job was here already; 0 when it waits no more
--          {'conflict', 0}             the id is taken by a different job
--          {'full', what, load, limit, retry after ms}   of jobs, tokens, tenant_jobs, tenant_tokens
--          {'late', eta ms, limit ms}  it cannot start in time
-- Keeps    all or nothing: refused means that no key was changed.

local job_id, sum, tenant, class = ARGV[2], ARGV[4], ARGV[7], tonumber(ARGV[10])
local start_within, end_within, reader_ms = tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
local ready, job = key.ready(model), key.job(job_id)

if redis.call('EXISTS', job) == 1 then
  if redis.call('HGET', job, 'mf_sum') ~= sum then return {'conflict', 0} end
  return {'known', redis.call('ZRANK', ready, job_id) or 0}
end

-- When it is worth asking again: when so many jobs will have left.
local function retry_after_ms(num_jobs)
  local _, num_slots = capacity()
  local service_ms = rate('service_ms')
  if num_slots == 0 or not service_ms then return 5000 end
  return math.floor(math.min(60000, math.max(1000, num_jobs * service_ms / num_slots)))
end

local prompt, answer = expected_tokens(tonumber(ARGV[11]), tonumber(ARGV[12]))
local entry = {class = class, cost = prompt + answer, answer = answer, tenant = tenant}
local loads = redis.call('HMGET', key.loads(model), 'tokens', 'jobs:' .. tenant, 'tokens:' .. tenant)
local depth = redis.call('LLEN', KEYS[1]) - redis.call('SCARD', key.unlisted(model))

-- An empty queue takes any job, however large.
local function check(what, load, added, limit)
  if load > 0 and load + added > limit then
    return {'full', what, load, limit, retry_after_ms((load + added - limit) / added)}
  end
end
local refusal = check('jobs', depth, 1, tonumber(ARGV[5]))
  or check('tokens', tonumber(loads[1] or 0), entry.cost, tonumber(ARGV[6]))
  or check('tenant_jobs', tonumber(loads[2] or 0), 1, tonumber(ARGV[8]))
  or check('tenant_tokens', tonumber(loads[3] or 0), entry.cost, tonumber(ARGV[9]))
if refusal then return refusal end

-- Where it would come: behind all whose score is lower. Only asked where it must not come too late.
local within = start_within > 0 and start_within or end_within
if within > 0 then
  local tag = math.max(virtual_time(class),
    tonumber(redis.call('ZSCORE', key.tags(model, class), tenant) or 0))
  local rank = redis.call('ZCOUNT', ready, '-inf', string.format('(%.17g', class * CLASS + tag))
  local _, answers = tokens_ahead(rank)
  local eta = eta_ms(rank, answers)
  if eta > within then return {'late', eta, within} end
end

local score, now = next_score(class, tenant, entry.cost), iso_now()
local start_by = start_within > 0 and whole(now_ms + start_within) or ''
local end_by = end_within > 0 and whole(now_ms + end_within) or ''
redis.call('HSET', job,
  'status', 'queued', 'origin', model, 'created_at', now, 'enqueued_at', now,
  'data', ARGV[16], 'description', ARGV[17], 'timeout', RUN_TTL_S,
  'result_ttl', ARGV[18], 'failure_ttl', ARGV[19],
  'started_at', '', 'ended_at', '', 'last_heartbeat', '', 'worker_name', '', 'group_id', '',
  'mf_request', ARGV[3], 'mf_sum', sum, 'mf_tenant', tenant, 'mf_class', class,
  'mf_score', whole(score), 'mf_cost', entry.cost, 'mf_answer', answer, 'mf_bytes', ARGV[11], 'mf_max', ARGV[12],
  'mf_at', whole(now_ms), 'mf_start_by', start_by, 'mf_end_by', end_by,
  'mf_keep', ARGV[21],
  'mf_attended', reader_ms > 0 and '1' or '', 'mf_token', '', 'mf_attempt', 0, 'mf_losses', 0)
-- A job of this id may have ended just now and left its channel for its readers.
redis.call('DEL', key.channel(job_id))
hold_response(job_id)
enter(job_id, entry, score)
list_append(job_id)
if class > 0 then redis.call('ZADD', key.ageing(model), now_ms + tonumber(ARGV[20]), job_id) end
local deadline = start_by ~= '' and start_by or end_by
if start_by ~= '' and end_by ~= '' then deadline = whole(math.min(now_ms + start_within, now_ms + end_within)) end
if deadline ~= '' then redis.call('ZADD', key.deadlines(model), deadline, job_id) end
if reader_ms > 0 then redis.call('SET', key.reader(job_id), '1', 'PX', reader_ms) end
redis.call('SADD', key.queues(), KEYS[1])
ring()
return {'queued', redis.call('ZRANK', ready, job_id)}
