-- Files of HTTP clients: how long they are kept, and whose they are.

local function keep_file(file_id, ttl_ms)
  if redis.call('EXISTS', key.file(file_id)) == 0 then return end
  redis.call('HSET', key.file(file_id), 'expires_ms', whole(now_ms + ttl_ms))
  redis.call('PEXPIRE', key.file(file_id), ttl_ms)
  redis.call('PEXPIRE', key.file_content(file_id), ttl_ms)
end

-- Put an id into the list of a tenant's own, which lives as long as what lives longest in it.
local function list_own(index, id, ttl_ms)
  redis.call('ZADD', index, now_ms, id)
  if redis.call('PTTL', index) < ttl_ms then redis.call('PEXPIRE', index, ttl_ms) end
end

-- Trim from a list of a tenant's own what has expired; returns what is left.
local function trim_own(index, name_of)
  local left = {}
  for _, id in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    if redis.call('EXISTS', name_of(id)) == 1 then
      left[#left + 1] = id
    else
      redis.call('ZREM', index, id)
    end
  end
  return left
end
