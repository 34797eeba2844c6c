-- uses: files
-- Make a file of what was uploaded as its content.
--
-- KEYS[1]  its record (file)
-- ARGV     1 file id, 2 tenant, 3 ms that it is kept, 4 most files of the tenant, 5 most bytes that
--          they may hold before it; the rest are field, value, ... of its record
-- Result   {'added'}; {'files', how many there are}; {'bytes', how many they hold}
-- Keeps    the record, its content and the tenant's list expire together. Refused means that nothing
--          was changed.

local file_id, tenant, ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local own = trim_own(key.own_files(tenant), key.file)
if #own >= tonumber(ARGV[4]) then return {'files', #own} end
local held = 0
for _, id in ipairs(own) do held = held + redis.call('STRLEN', key.file_content(id)) end
if held >= tonumber(ARGV[5]) then return {'bytes', held} end

redis.call('HSET', KEYS[1], 'tenant', tenant, 'created_ms', whole(now_ms),
  'expires_ms', whole(now_ms + ttl_ms), unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[1], ttl_ms)
redis.call('PEXPIRE', key.file_content(file_id), ttl_ms)
list_own(key.own_files(tenant), file_id, ttl_ms)
return {'added'}
