-- uses: privileged outcome
-- Append the next pieces of answers, each of another job: all that one step has to say.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, then for each piece: job id, run, tokens of the answer before it and with it, body
-- Result   for each piece: DONE, also by an earlier call; LOST, the run is not the job's any more; or
--          how many tokens the channel has, which the piece does not follow: nothing was appended
-- Keeps    a channel holds tokens 1..n once each: a Redis that came back without its last writes is
--          told of them again, and never of what follows them.

local function append(job_id, run, num_before, num_tokens, body)
  local last_run, last = channel_tail(job_id)
  if last_run ~= tonumber(run) then return LOST end
  if last >= tonumber(num_tokens) then return DONE end
  if last ~= tonumber(num_before) then return last end
  redis.call('XADD', key.channel(job_id), run .. '-' .. num_tokens, 'k', 't', 'd', body)
  return DONE
end

local outcomes = {}
for i = 2, #ARGV, 5 do
  outcomes[#outcomes + 1] = append(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
end
return outcomes
