-- Who waits, and who goes first.
--
-- Strict classes, 0 first; inside a class start-time fair queueing between tenants (Goyal, Vin and
-- Cheng, SIGCOMM 1996): a job's tag is where its tenant's last job ended, or the class's virtual
-- time if that is later, and it ends its cost over its tenant's weight further on. A job that has
-- waited for long moves up a class, as if it came now.
--
-- `waiting` is the truth about who waits, at which cost and for whom; `loads` are its sums.

local CLASS = 1e12 -- distance between classes in the scores: more than the tags of any busy period
local NUM_CLASSES = 3

local function class_of(field, otherwise)
  local class = count(field, otherwise)
  return class < NUM_CLASSES and class or otherwise
end

local function waiting_entry(job_id)
  local entry = redis.call('HGET', key.waiting(model), job_id)
  if not entry then return nil end
  local class, cost, answer, tenant = string.match(entry, '^(%d+) (%d+) (%d+) (.*)$')
  if not class then return nil end
  return {class = tonumber(class), cost = tonumber(cost), answer = tonumber(answer), tenant = tenant}
end

local function virtual_time(class)
  return tonumber(redis.call('ZSCORE', key.tags(model, class), '') or 0)
end

-- Give the next job of a tenant its place in a class, as a score.
local function next_score(class, tenant, cost)
  local tags = key.tags(model, class)
  local weight = number(redis.call('HGET', key.weights(), tenant), 1)
  local tag = math.max(virtual_time(class), tonumber(redis.call('ZSCORE', tags, tenant) or 0))
  redis.call('ZADD', tags, tag + cost / weight, tenant)
  return class * CLASS + tag
end

-- The class's virtual time is the tag of the job that was taken last; tenants behind it owe nothing.
local function advance(class, tag)
  local tags = key.tags(model, class)
  redis.call('ZADD', tags, 'GT', tag, '')
  redis.call('ZREMRANGEBYSCORE', tags, '-inf', string.format('(%.17g', tag))
end

local function add_load(field, amount)
  if amount == 0 then return end -- Redis knows no -0
  if redis.call('HINCRBY', key.loads(model), field, amount) <= 0 then
    redis.call('HDEL', key.loads(model), field)
  end
end

local function change_loads(entry, sign)
  add_load('tokens', sign * entry.cost)
  add_load('answers', sign * entry.answer)
  add_load('jobs:' .. entry.tenant, sign)
  add_load('tokens:' .. entry.tenant, sign * entry.cost)
end

-- Let a job wait: in the order, or alone among the suspects when it has no score.
local function enter(job_id, entry, score)
  redis.call('HSET', key.waiting(model), job_id,
    whole(entry.class) .. ' ' .. whole(entry.cost) .. ' ' .. whole(entry.answer) .. ' ' .. entry.tenant)
  change_loads(entry, 1)
  if score then
    redis.call('ZADD', key.ready(model), score, job_id)
  else
    redis.call('ZADD', key.suspects(model), now_ms, job_id)
  end
end

-- Take a job out of all that waits; returns what it was there, nil where it did not wait.
local function leave(job_id)
  local entry = waiting_entry(job_id)
  redis.call('HDEL', key.waiting(model), job_id)
  redis.call('ZREM', key.ready(model), job_id)
  redis.call('ZREM', key.suspects(model), job_id)
  redis.call('ZREM', key.ageing(model), job_id)
  redis.call('ZREM', key.deadlines(model), job_id)
  if entry then change_loads(entry, -1) end
  return entry
end

-- Whoever has waited for long in a lower class moves up one; at most `limit` at a time.
local function move_up(ageing_ms, limit)
  local due = redis.call('ZRANGEBYSCORE', key.ageing(model), '-inf', whole(now_ms), 'LIMIT', 0, limit)
  for _, job_id in ipairs(due) do
    local entry = waiting_entry(job_id)
    redis.call('ZREM', key.ageing(model), job_id)
    if entry and entry.class > 0 and redis.call('ZSCORE', key.ready(model), job_id) then
      entry.class = entry.class - 1
      local score = next_score(entry.class, entry.tenant, entry.cost)
      redis.call('HSET', key.waiting(model), job_id, whole(entry.class) .. ' ' .. whole(entry.cost)
        .. ' ' .. whole(entry.answer) .. ' ' .. entry.tenant)
      redis.call('ZADD', key.ready(model), score, job_id)
      redis.call('HSET', key.job(job_id), 'mf_score', whole(score), 'mf_class', entry.class)
      if entry.class > 0 then
        redis.call('ZADD', key.ageing(model), now_ms + tonumber(ageing_ms), job_id)
      end
    end
  end
end

-- An idle queue owes nobody anything.
local function forget_tags_if_idle()
  if redis.call('EXISTS', key.ready(model)) == 0 then
    for class = 0, NUM_CLASSES - 1 do redis.call('DEL', key.tags(model, class)) end
  end
end
