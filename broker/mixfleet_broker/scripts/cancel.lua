-- uses: outcome order mirror
-- End a job from outside, queued or started. Its end fences the very next append of its worker.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 body of the end
-- Result   {the status that it had, or false where there is no such job in this queue; ends as of
--          claim}
-- Keeps    a cancelled job is never claimed; a job that has ended stays as it is.

local job_id = ARGV[2]
local v = job_fields(job_id, 'status', 'mf_token', 'origin', 'worker_name')
if not v[1] or v[3] ~= model then return {false, ended} end
settle_foreign_end(job_id, v[1])
if v[1] ~= 'queued' and v[1] ~= 'started' then return {v[1], ended} end

if v[1] == 'started' and v[2] then
  drop_lease(job_id, v[2])
  tell_worker(v[4], 'c:' .. job_id .. ':' .. v[2])
else
  leave(job_id)
  unlist(job_id)
end
redis.call('HSET', key.job(job_id), 'mf_token', '')
settle(job_id, 'canceled', ARGV[3], CANCELED_TTL_S, CANCELED_TTL_S)
return {v[1], ended}
