-- End a job from outside, queued or started. Its end fences the very next append of its worker.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 body of the end
-- Result   the status that it had; false where there is no such job in this queue
-- Keeps    a cancelled job is never claimed; a job that has ended stays as it is.

local job_id = ARGV[2]
local v = job_fields(job_id, 'status', 'mf_token', 'origin')
if not v[1] or v[3] ~= model then return false end
if v[1] == 'canceled' then settle_foreign_cancel(job_id, ARGV[3]) end
if v[1] ~= 'queued' and v[1] ~= 'started' then return v[1] end

redis.call('LREM', KEYS[1], 1, job_id)
redis.call('ZREM', key.ready(model), job_id)
if v[1] == 'started' and v[2] then drop_lease(job_id, v[2]) end
redis.call('HSET', key.job(job_id), 'mf_token', '')
settle(job_id, 'canceled', ARGV[3], CANCELED_TTL_S, CANCELED_TTL_S)
return v[1]
