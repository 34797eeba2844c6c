-- uses: buckets
-- Charge a request to an API key, if all of the key's limits allow it.
--
-- KEYS[1]  what the key has used (api_use)
-- ARGV     1 key id, 2 most requests a minute, 3 most tokens a minute, 4 most tokens a day (UTC),
--          5 most unfinished jobs, each -1 for no limit, 6 tokens expected of each job,
--          7 and the following are the request's job ids: without any it is a look, which charges nothing
-- Result   {'admitted', '', 0, 0, 0, states}  also by an earlier call with these jobs
--          {'refused', limit, its number, load, retry after ms, states}  by the limit that holds
--          longest: requests, tokens, tokens_day or jobs; -1 ms: never, the limit is too small
--          states: {limit, its number, what remains, ms until all of it does}, ... of each that is set
-- Keeps    all or nothing: refused means that nothing was charged. What is charged for a job can be
--          given back once, as long as its api_charge is there.

local key_id = ARGV[1]
local tokens_per_job, num_jobs = tonumber(ARGV[6]), #ARGV - 6
local num_tokens = tokens_per_job * num_jobs
local SUBMIT_MS = 30000 -- between the admission of a job and its being in the queue
local SWEEP_MS = 1000 -- at most so often, and when it is worth asking again for a place
local JOBS_TTL_S = 31 * 86400 -- longer than any job may take
local UNFINISHED = {queued = true, started = true}

local to_midnight_ms = (day + 1) * DAY_MS - now_ms
-- Whether all jobs are charged to this key already: the reply to the first call was lost.
local function is_repeated()
  for i = 7, #ARGV do
    local charge = redis.call('GET', key.api_charge(ARGV[i])) or ''
    if string.match(charge, '^%S+') ~= key_id then return false end
  end
  return true
end
local is_new = num_jobs > 0 and not is_repeated()

local limits = {} -- each that is set, in the order in which they are told
local function add_bucket(name, number, added)
  if number < 0 then return end
  local level, capacity = level_of(name, number), number * MINUTE_MS
  limits[#limits + 1] = {name = name, number = number, added = added, level = level,
    load = math.ceil(level / MINUTE_MS), free = math.floor((capacity - level) / MINUTE_MS),
    wait_ms = math.ceil((level + added * MINUTE_MS - capacity) / number)}
end

local function add_day(number)
  if number < 0 then return end
  local used = tokens_today()
  limits[#limits + 1] = {name = 'tokens_day', number = number, added = num_tokens, load = used,
    free = number - used, wait_ms = used + num_tokens > number and to_midnight_ms or 0}
end

-- Take out whoever has ended and was not settled, as its gateway died, or was never submitted.
local function sweep()
  if now_ms - count(redis.call('HGET', KEYS[1], 'swept'), 0) < SWEEP_MS then return end
  redis.call('HSET', KEYS[1], 'swept', whole(now_ms))
  redis.call('EXPIRE', KEYS[1], USE_TTL_S)
  local members = redis.call('ZRANGE', key.api_jobs(key_id), 0, -1, 'WITHSCORES')
  for i = 1, #members, 2 do
    local status = job_fields(members[i], 'status')[1]
    local is_coming = not status and now_ms - tonumber(members[i + 1]) < SUBMIT_MS
    if not UNFINISHED[status or ''] and not is_coming then
      redis.call('ZREM', key.api_jobs(key_id), members[i])
    end
  end
end

local function add_jobs(number)
  if number < 0 then return end
  local held = redis.call('ZCARD', key.api_jobs(key_id))
  if is_new and num_jobs <= number and held + num_jobs > number then
    sweep()
    held = redis.call('ZCARD', key.api_jobs(key_id))
  end
  limits[#limits + 1] = {name = 'jobs', number = number, added = num_jobs, load = held,
    free = number - held, wait_ms = held + num_jobs > number and SWEEP_MS or 0}
end

local function reset_ms(limit, added)
  if limit.level then return math.ceil((limit.level + added * MINUTE_MS) / limit.number) end
  local resets = limit.name == 'tokens_day' and limit.load + added > 0
  return resets and to_midnight_ms or 0
end

local function states(is_charged)
  local found = {}
  for i, limit in ipairs(limits) do
    local added = is_charged and limit.added or 0
    found[i] = {limit.name, limit.number, math.max(0, limit.free - added), reset_ms(limit, added)}
  end
  return found
end

-- The limit that holds longest, and for how long; one that the request alone exceeds holds for ever.
local function refusing()
  local worst, longest = nil, 0
  for _, limit in ipairs(limits) do
    local wait_ms = limit.added > limit.number and math.huge or limit.wait_ms
    if wait_ms > longest then worst, longest = limit, wait_ms end
  end
  return worst, longest == math.huge and -1 or longest
end

-- Returns the levels before, by bucket; nil where there is none.
local function charge_limits()
  local before = {}
  for _, limit in ipairs(limits) do
    if limit.level then
      keep_level(limit.name, limit.level + limit.added * MINUTE_MS)
      before[limit.name] = limit.level
    elseif limit.name == 'jobs' then
      for i = 7, #ARGV do redis.call('ZADD', key.api_jobs(key_id), now_ms, ARGV[i]) end
      redis.call('EXPIRE', key.api_jobs(key_id), JOBS_TTL_S)
    end
  end
  keep_tokens_today(tokens_today() + num_tokens)
  redis.call('EXPIRE', KEYS[1], USE_TTL_S)
  return before
end

-- Note what each job was charged, and up to where it filled the buckets.
local function note_charges(before)
  -- After the day, and a minute, nothing could be given back any more.
  local ttl_ms = whole(math.max(MINUTE_MS, to_midnight_ms))
  for i = 7, #ARGV do
    local top = before.tokens and before.tokens + (i - 6) * tokens_per_job * MINUTE_MS or 0
    local request_top = i == 7 and before.requests and before.requests + MINUTE_MS or 0
    local charge = {key_id, whole(tokens_per_job), whole(day), whole(now_ms), whole(top),
      whole(request_top)}
    redis.call('SET', key.api_charge(ARGV[i]), table.concat(charge, ' '), 'PX', ttl_ms)
  end
end

add_bucket('requests', tonumber(ARGV[2]), num_jobs > 0 and 1 or 0)
add_bucket('tokens', tonumber(ARGV[3]), num_tokens)
add_day(tonumber(ARGV[4]))
add_jobs(tonumber(ARGV[5]))
if not is_new then return {'admitted', '', 0, 0, 0, states(false)} end
local worst, wait_ms = refusing()
if worst then return {'refused', worst.name, worst.number, worst.load, wait_ms, states(false)} end
note_charges(charge_limits())
return {'admitted', '', 0, 0, 0, states(true)}
