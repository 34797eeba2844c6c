-- uses: buckets
-- Give back what an API key was charged for jobs and they did not use.
--
-- KEYS[1]  what the key has used (api_use)
-- ARGV     1 key id, 2 most requests a minute, 3 most tokens a minute, each -1 for no limit, 4 whether
--          the request itself is given back; the rest are pairs of a job id and the tokens that it used
-- Result   how many of the jobs had not been settled before
-- Keeps    a job is settled once, and leaves the key's unfinished jobs; nothing falls below 0, and
--          nothing is given back that has leaked out of its bucket, or was of another day.

local key_id = ARGV[1]
local requests_limit, tokens_limit = tonumber(ARGV[2]), tonumber(ARGV[3])

-- Take out of a bucket what was charged at `at` and filled it up to `top`. It loses the oldest first,
-- so no more than what lies below the top by now is still there.
local function take_out(name, limit, amount, top, at)
  if limit < 0 then return end
  local left = math.max(0, top - limit * math.max(0, now_ms - at))
  keep_level(name, math.max(0, level_of(name, limit) - math.min(amount, left)))
end

local num_settled = 0
for i = 5, #ARGV, 2 do
  redis.call('ZREM', key.api_jobs(key_id), ARGV[i])
  local charge = redis.call('GET', key.api_charge(ARGV[i])) or ''
  local whose, tokens, on, at, top, request_top =
    string.match(charge, '^(%S+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
  if whose == key_id then
    redis.call('DEL', key.api_charge(ARGV[i]))
    num_settled = num_settled + 1
    local unused = math.max(0, tonumber(tokens) - tonumber(ARGV[i + 1]))
    take_out('tokens', tokens_limit, unused * MINUTE_MS, tonumber(top), tonumber(at))
    if tonumber(on) == day then keep_tokens_today(math.max(0, tokens_today() - unused)) end
    if ARGV[4] == '1' then
      take_out('requests', requests_limit, MINUTE_MS, tonumber(request_top), tonumber(at))
    end
  end
end
if num_settled > 0 then redis.call('EXPIRE', KEYS[1], USE_TTL_S) end
return num_settled
