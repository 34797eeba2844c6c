-- uses: outcome order mirror losses
-- End one job whose time is over. For its own client, where nobody else looks after the queue.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 result ttl s, 4 failure ttl s
-- Result   ends as of claim
-- Keeps    a job whose time is not over stays as it is.

local job_id = ARGV[2]
limits = {result_ttl_s = ARGV[3], failure_ttl_s = ARGV[4]}
local due = redis.call('ZSCORE', key.deadlines(model), job_id)
if due and tonumber(due) <= now_ms then expire(job_id) end
return ended
