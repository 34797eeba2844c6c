-- uses: files
-- Open a batch, for any gateway to drive.
--
-- KEYS[1]  its record (batch)
-- ARGV     1 batch id, 2 tenant, 3 input file, 4 output file, 5 error file, 6 ms of its window, 7 ms
--          that it and its files are kept after its end, 8 most files of the tenant, 9 most batches
--          of the tenant; the rest are field, value, ... of its record
-- Result   {'opened'}, also by an earlier call; {'no_file'}; {'files', how many there are};
--          {'batches', how many there are}
-- Keeps    an open batch has its record, its three files and its place among the open ones.

local batch_id, tenant, input, output, errors = unpack(ARGV, 1, 5)
local window_ms, ttl_ms = tonumber(ARGV[6]), tonumber(ARGV[7])
if redis.call('EXISTS', KEYS[1]) == 1 then return {'opened'} end
if redis.call('EXISTS', key.file(input)) == 0 then return {'no_file'} end
local own = trim_own(key.own_files(tenant), key.file)
if #own + 2 > tonumber(ARGV[8]) then return {'files', #own} end
local batches = trim_own(key.own_batches(tenant), key.batch)
if #batches >= tonumber(ARGV[9]) then return {'batches', #batches} end

local kept_ms = window_ms + ttl_ms
redis.call('HSET', KEYS[1], 'tenant', tenant, 'input_file', input, 'output_file', output,
  'error_file', errors, 'status', 'validating', 'created_ms', whole(now_ms),
  'expires_ms', whole(now_ms + window_ms), 'ttl_ms', ARGV[7], 'total', 0, 'completed', 0, 'failed', 0,
  'prompt_tokens', 0, 'completion_tokens', 0, unpack(ARGV, 10))
redis.call('PEXPIRE', KEYS[1], kept_ms)
local purposes = {[output] = 'output', [errors] = 'error'}
for id, what in pairs(purposes) do
  redis.call('HSET', key.file(id), 'tenant', tenant, 'created_ms', whole(now_ms), 'batch', batch_id,
    'filename', batch_id .. '_' .. what .. '.jsonl', 'purpose', 'batch_output',
    'expires_ms', whole(now_ms + kept_ms))
  redis.call('PEXPIRE', key.file(id), kept_ms)
  list_own(key.own_files(tenant), id, kept_ms)
end
if redis.call('PTTL', key.file(input)) < kept_ms then keep_file(input, kept_ms) end
list_own(key.own_batches(tenant), batch_id, kept_ms)
redis.call('ZADD', key.batches_open(), 0, batch_id)
return {'opened'}
