-- What an API key uses: of each minute in leaky buckets, of each day (UTC) in a sum.
--
-- A bucket of a limit of n a minute holds n * 60000 and loses n each ms, so that everything in it is
-- a whole number, and who asks at the named ms is admitted. It is kept as "level ms" in one field.

local MINUTE_MS = 60000
local DAY_MS = 86400000
local USE_TTL_S = 2 * 86400

local day = math.floor(now_ms / DAY_MS)

-- How full a bucket is by now.
local function level_of(name, limit)
  local kept = redis.call('HGET', KEYS[1], name)
  local level, at = string.match(kept or '', '^(%d+) (%d+)$')
  if not level then return 0 end
  return math.max(0, tonumber(level) - limit * math.max(0, now_ms - tonumber(at)))
end

local function keep_level(name, level)
  redis.call('HSET', KEYS[1], name, whole(level) .. ' ' .. whole(now_ms))
end

-- Tokens charged today.
local function tokens_today()
  local kept = redis.call('HMGET', KEYS[1], 'day', 'day_tokens')
  if count(kept[1], -1) ~= day then return 0 end
  return count(kept[2], 0)
end

local function keep_tokens_today(tokens)
  redis.call('HSET', KEYS[1], 'day', whole(day), 'day_tokens', whole(tokens))
end
