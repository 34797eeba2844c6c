-- uses: privileged outcome order mirror
-- Let a failed job run again from nothing, as an operator wishes.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id
-- Result   the status that it had; false where there is no such job in this queue
-- Keeps    only a failed job is changed; its history stays.

local job_id = ARGV[2]
local v = job_fields(job_id, 'status', 'origin', 'mf_class', 'mf_cost', 'mf_answer', 'mf_tenant')
if not v[1] or v[2] ~= model then return false end
if v[1] ~= 'failed' then return v[1] end

local entry = {class = class_of(v[3], 1), cost = count(v[4], 0), answer = count(v[5], 0),
  tenant = v[6] or 'default'}
local score, now = next_score(entry.class, entry.tenant, entry.cost), iso_now()
redis.call('ZREM', key.failed(model), job_id)
redis.call('DEL', key.channel(job_id), key.results(job_id))
redis.call('PERSIST', key.job(job_id))
-- Its deadlines were for the first time.
redis.call('HSET', key.job(job_id), 'status', 'queued', 'enqueued_at', now, 'ended_at', '',
  'started_at', '', 'worker_name', '', 'mf_token', '', 'mf_losses', 0, 'mf_attempt', 0,
  'mf_score', whole(score), 'mf_at', whole(now_ms), 'mf_start_by', '', 'mf_end_by', '',
  'mf_attended', '')
hold_response(job_id)
enter(job_id, entry, score)
list_append(job_id)
redis.call('SADD', key.queues(), KEYS[1])
ring()
return v[1]
