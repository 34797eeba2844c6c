-- Forget a file.
--
-- KEYS[1]  its record (file)
-- ARGV     1 file id
-- Result   1 done; 0 there is none
-- Keeps    a batch that was to write into it goes on without it.

local file_id = ARGV[1]
local tenant = redis.call('HGET', KEYS[1], 'tenant')
redis.call('DEL', key.file_content(file_id))
if not tenant then return 0 end
redis.call('ZREM', key.own_files(tenant), file_id)
redis.call('DEL', KEYS[1])
return 1
