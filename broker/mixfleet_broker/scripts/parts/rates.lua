-- What is known of the fleet's speed, and what follows from it for who waits.
--
-- `capacity` says how many jobs each live worker takes at once; `rates` holds moving averages over
-- finished jobs. The estimates are for a queue that is served job by job as slots come free.

local FIRST_SAMPLES = 20 -- until then a plain mean
local SMOOTHING = 0.05
local RATES_TTL_S = 7 * 86400
local DEFAULT_ANSWER = 256 -- tokens expected of an answer before any was measured
local DEFAULT_BYTES_PER_TOKEN = 4
local EXACT = 128 -- jobs ahead whose costs are added up one by one

local function rate(name)
  return number(redis.call('HGET', key.rates(model), name))
end

local function learn(samples)
  local rates = key.rates(model)
  local n = redis.call('HINCRBY', rates, 'samples', 1)
  local share = n <= FIRST_SAMPLES and 1 / n or SMOOTHING
  for name, value in pairs(samples) do
    local mean = rate(name) or value
    redis.call('HSET', rates, name, string.format('%.6g', mean + share * (value - mean)))
  end
  redis.call('EXPIRE', rates, RATES_TTL_S)
end

-- Tokens that a job will take: of its prompt by its bytes, of its answer by the answers so far.
local function expected_tokens(prompt_bytes, max_tokens)
  local prompt = math.ceil(prompt_bytes / (rate('bytes_per_token') or DEFAULT_BYTES_PER_TOKEN))
  local answer = math.ceil(rate('answer_tokens') or DEFAULT_ANSWER)
  if max_tokens > 0 then answer = math.min(answer, max_tokens) end
  return prompt, answer
end

-- Live workers that take jobs, the jobs they take at once, and live workers in all.
local function capacity()
  local num_workers, num_slots, num_alive = 0, 0, 0
  local entries = redis.call('HGETALL', key.capacity(model))
  for i = 2, #entries, 2 do
    local slots, until_ms = string.match(entries[i], '^(%d+) (%d+)$')
    if slots and tonumber(until_ms) >= now_ms then
      num_alive = num_alive + 1
      if tonumber(slots) > 0 then
        num_workers, num_slots = num_workers + 1, num_slots + tonumber(slots)
      end
    end
  end
  return num_workers, num_slots, num_alive
end

-- Tokens, and tokens of answers alone, of the jobs before a rank: added up where they are few, else by
-- the mean of all that wait. So also for a client of least privilege, which may not see who waits.
-- Of an answer no more is expected than what is known now of answers.
local function tokens_ahead(rank)
  if rank == 0 then return 0, 0 end
  local longest = rate('answer_tokens') or math.huge
  local ahead = rank <= EXACT and redis.pcall('ZRANGE', key.ready(model), 0, rank - 1) or {err = ''}
  if ahead.err then
    local num_waiting = math.max(1, redis.call('HLEN', key.waiting(model)))
    local sums = redis.call('HMGET', key.loads(model), 'tokens', 'answers')
    return rank * tonumber(sums[1] or 0) / num_waiting,
      rank * math.min(longest, tonumber(sums[2] or 0) / num_waiting)
  end
  local tokens, answers = 0, 0
  for _, entry in ipairs(redis.call('HMGET', key.waiting(model), unpack(ahead))) do
    local cost, answer = string.match(entry or '', '^%d+ (%d+) (%d+) ')
    tokens = tokens + tonumber(cost or 0)
    answers = answers + math.min(longest, tonumber(answer or 0))
  end
  return tokens, answers
end

-- Milliseconds until a job with so many before it starts; -1 where nothing is measured yet or
-- nobody serves. Slots come free one by one, a job's length goes with the answer expected of it.
local function eta_ms(rank, answers_ahead)
  local _, num_slots = capacity()
  if num_slots == 0 then return -1 end
  local free = num_slots - redis.call('ZCARD', key.leases(model))
  if rank < free then return 0 end
  local service_ms, expected = rate('service_ms'), rate('expected_tokens')
  if not service_ms or not expected then return -1 end
  -- What was expected of those ahead beside what was expected of those that were measured.
  local length = 1
  if rank > 0 then length = answers_ahead / rank / math.max(1, expected) end
  return math.floor((rank + 1 - math.max(0, free)) * length * service_ms / num_slots)
end
