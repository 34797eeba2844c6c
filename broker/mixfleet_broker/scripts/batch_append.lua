-- Write the results of lines into a batch's files, each once.
--
-- KEYS[1]  the batch's record (batch)
-- ARGV     1 batch id, 2 the driver's token; the rest are fives of: place of the line in its file from
--          0, `output` or `error`, tokens of the prompt, tokens of the answer, the result with its end
--          of line
-- Result   how many were not there before; -1 the batch is not the caller's any more
-- Keeps    a line is marked as done if and only if its result is in one of the files, once, and is
--          counted; results are in the order in which they came.

local batch_id, token = ARGV[1], ARGV[2]
if redis.call('HGET', KEYS[1], 'lease') ~= token then return -1 end
local files = {
  output = redis.call('HGET', KEYS[1], 'output_file'),
  error = redis.call('HGET', KEYS[1], 'error_file'),
}
local counted = {output = 'completed', error = 'failed'}

local function write(what, result)
  local file_id = files[what]
  local left = redis.call('PTTL', key.file(file_id))
  if left < 0 then return end -- its owner has deleted it
  redis.call('APPEND', key.file_content(file_id), result)
  if redis.call('PTTL', key.file_content(file_id)) < 0 then
    redis.call('PEXPIRE', key.file_content(file_id), left)
  end
end

local num_new = 0
for i = 3, #ARGV, 5 do
  local what = ARGV[i + 1]
  if redis.call('SETBIT', key.batch_done(batch_id), ARGV[i], 1) == 0 then
    num_new = num_new + 1
    write(what, ARGV[i + 4])
    redis.call('HINCRBY', KEYS[1], counted[what], 1)
    redis.call('HINCRBY', KEYS[1], 'prompt_tokens', ARGV[i + 2])
    redis.call('HINCRBY', KEYS[1], 'completion_tokens', ARGV[i + 3])
  end
end
if redis.call('PTTL', key.batch_done(batch_id)) == -1 then
  redis.call('PEXPIRE', key.batch_done(batch_id), redis.call('PTTL', KEYS[1]))
end
return num_new
