-- Shared by all scripts; lua.py puts it and the table `key` (see keys.py) before each of them.
--
-- KEYS[1]  rq's list of the queue. All other names are made by `key`: one pool is one Redis.
-- ARGV[1]  the model, which is the queue's name.
--
-- The only clock is Redis's own. A job's state is the `status` of its hash; a run may write while
-- the hash's mf_token is its own and the status is `started`. Each script is atomic, and leaves
-- each job in exactly one place: queued (ready + list), started (leases) or ended.

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
local CANCELED_TTL_S = 300
local BELL_TTL_S = 3600
local MAX_RINGS = 64
-- As readers of the channel accept them; ms of the clock have 13.
local MAX_RUN_DIGITS = 15

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

-- Where a job's channel ends: ms of the last id, tokens delivered, whether the end is said.
local function channel_tail(job_id)
  local last = redis.pcall('XREVRANGE', key.channel(job_id), '+', '-', 'COUNT', 1)
  if last.err then -- a key of another type in the place of the channel
    redis.call('DEL', key.channel(job_id))
    return 0, 0, false
  end
  if not last[1] then return 0, 0, false end
  local ms, num_tokens = string.match(last[1][1], '^(%d+)%-(%d+)$')
  if #ms > MAX_RUN_DIGITS then -- no run of ours, and nothing can be said after it
    redis.call('DEL', key.channel(job_id))
    return 0, 0, false
  end
  return tonumber(ms), tonumber(num_tokens), last[1][2][2] == 'e'
end

-- A run number above the clock and above all in the channel: it fences every earlier run, also
-- when a failover has forgotten the claim that made it.
local function run_after(last_ms)
  return math.max(now_ms, last_ms + 1)
end

-- Say the end, once. Its run number is a new one, so it fences the run that was going on.
local function say_end(job_id, body, ttl_s)
  local last_ms, num_tokens, ended = channel_tail(job_id)
  if not ended then
    redis.call('XADD', key.channel(job_id), whole(run_after(last_ms)) .. '-' .. whole(num_tokens),
      'k', 'e', 'd', body)
  end
  redis.call('EXPIRE', key.channel(job_id), ttl_s)
end

-- Take a run out of all places that hold runs; harmless where it is in none of them.
local function drop_lease(job_id, token)
  local member = job_id .. ':' .. token
  local execution = key.execution(job_id, token)
  local worker_id = redis.call('HGET', execution, 'worker_name')
  redis.call('ZREM', key.leases(model), member)
  redis.call('ZREM', key.wip(model), member)
  redis.call('ZREM', key.executions(job_id), token)
  redis.call('DEL', execution)
  if worker_id then redis.call('SREM', key.worker_executions(worker_id), member) end
end

local function ring()
  if redis.call('LLEN', key.bell(model)) < MAX_RINGS then
    redis.call('LPUSH', key.bell(model), '1')
  end
  redis.call('EXPIRE', key.bell(model), BELL_TTL_S)
end

-- End a job: its state, its registry, its times to live and its last event.
local function settle(job_id, status, body, ttl_s, channel_ttl_s)
  redis.call('HSET', key.job(job_id), 'status', status, 'ended_at', iso_now())
  redis.call('EXPIRE', key.job(job_id), ttl_s)
  redis.call('ZADD', key[status](model), now_s + ttl_s, job_id)
  say_end(job_id, body, channel_ttl_s)
end

-- rq's own Job.cancel knows nothing of channels and sets no time to live: make up for it. The
-- body of a cancelled end is the same for all.
local function settle_foreign_cancel(job_id, body)
  local _, _, ended = channel_tail(job_id)
  if not ended then settle(job_id, 'canceled', body, CANCELED_TTL_S, CANCELED_TTL_S) end
end

-- What rq's tools show of an outcome.
local function record_result(job_id, ttl_s, ...)
  redis.call('XADD', key.results(job_id), 'MAXLEN', 10, '*', ...)
  redis.call('EXPIRE', key.results(job_id), ttl_s)
end
