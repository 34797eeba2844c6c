-- The ground that all scripts stand on; lua.py puts it and the table `key` (see keys.py) before
-- each of them, then the other parts that the script's first line names.
--
-- KEYS[1]  rq's list of the queue. All other names are made by `key`: one pool is one Redis.
-- ARGV[1]  the model, which is the queue's name.
-- The scripts of API keys have a hash of the key and the key's id in their places.
--
-- The only clock is Redis's own. A job's state is the `status` of its hash; a run may write while
-- the hash's mf_token is its own and the status is `started`. Each script is atomic, and leaves
-- each job in exactly one place: queued (waiting, in ready or suspects), started (leases) or ended.

local model = ARGV[1]
local clock = redis.call('TIME')
local now_s = tonumber(clock[1])
local now_us = tonumber(clock[2])
local now_ms = now_s * 1000 + math.floor(now_us / 1000)

-- rq's registry of started jobs is kept this far ahead of any clock: its clean-up must never
-- touch a job of ours, whose true lease lies elsewhere.
local WIP_AHEAD_S = 3600
-- What a lost worker leaves behind goes away after this time without a renewal.
local RUN_TTL_S = 7200
local BELL_TTL_S = 3600
local MAX_RINGS = 64

-- The number in a field; `otherwise` where there is none, or none of ours: whoever could write into a
-- hash must not stop the scripts that look after all jobs.
local MAX_NUMBER = 1e15
local function number(field, otherwise)
  local n = tonumber(field or nil)
  if not n or n ~= n or math.abs(n) > MAX_NUMBER then return otherwise end
  return n
end

-- The same for what is counted.
local function count(field, otherwise)
  local n = number(field, -1)
  if n < 0 then return otherwise end
  return math.floor(n)
end

-- Whole numbers as text; Lua itself would write large ones as 1.8e+12.
local function whole(n)
  return string.format('%.0f', n)
end

-- The current time as rq writes it. Days to a date by 400-year eras that begin on March 1.
local function iso_now()
  local days = math.floor(now_s / 86400) + 719468
  local era = math.floor(days / 146097)
  local day_of_era = days - era * 146097
  local year_of_era = math.floor((day_of_era - math.floor(day_of_era / 1460)
    + math.floor(day_of_era / 36524) - math.floor(day_of_era / 146096)) / 365)
  local day_of_year = day_of_era
    - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local march_month = math.floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - math.floor((153 * march_month + 2) / 5) + 1
  local month = march_month < 10 and march_month + 3 or march_month - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  local second = now_s % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day,
    math.floor(second / 3600), math.floor(second / 60) % 60, second % 60, now_us)
end

-- Make sure that a key may be written as a type: a stranger's value in its place goes.
local function reclaim(name, kind)
  local found = redis.call('TYPE', name).ok
  if found ~= kind and found ~= 'none' then redis.call('DEL', name) end
end

-- Fields of a job's hash; all false where there is no such hash.
local function job_fields(job_id, ...)
  local values = redis.pcall('HMGET', key.job(job_id), ...)
  if values.err then -- a key of another type: nobody's job
    values = {}
    for i = 1, select('#', ...) do values[i] = false end
  end
  return values
end

local function ring()
  if redis.call('LLEN', key.bell(model)) < MAX_RINGS then
    redis.call('LPUSH', key.bell(model), '1')
  end
  redis.call('EXPIRE', key.bell(model), BELL_TTL_S)
end
