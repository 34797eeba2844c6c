-- rq's list of the queue: it shows rq's tools who waits, and rq's producers push into it.
--
-- Redis finds an element of a list by searching it, which a deep queue cannot afford at every
-- claim. So each job keeps its number in the list (mf_place), counted from where the list began: the
-- head's number is in `list_base`. Whoever leaves from the middle is replaced by the head. What rq's
-- own tools take out moves the elements behind it by one, hence the search around the place.

local SEARCH_AROUND = 32

local function list_base()
  return number(redis.call('GET', key.list_base(model)), 0)
end

local function list_append(job_id)
  local length = redis.call('RPUSH', KEYS[1], job_id)
  redis.call('HSET', key.job(job_id), 'mf_place', whole(list_base() + length - 1))
end

local function list_prepend(job_id)
  redis.call('LPUSH', KEYS[1], job_id)
  redis.call('HSET', key.job(job_id), 'mf_place', whole(redis.call('DECR', key.list_base(model))))
end

local function pop_head()
  local head = redis.call('LPOP', KEYS[1])
  if redis.call('EXISTS', KEYS[1]) == 0 then
    redis.call('DEL', key.list_base(model))
  else
    redis.call('INCR', key.list_base(model))
  end
  return head
end

-- Where in the list a job is; nil if it is not near its place.
local function find_near(job_id, place)
  local index = place - list_base()
  if index >= 0 and redis.call('LINDEX', KEYS[1], whole(index)) == job_id then return index end
  local from = math.max(0, index - SEARCH_AROUND)
  local to = index + SEARCH_AROUND
  if to < 0 then return nil end
  for i, near in ipairs(redis.call('LRANGE', KEYS[1], whole(from), whole(to))) do
    if near == job_id then return from + i - 1 end
  end
  return nil
end

local function list_remove(job_id)
  if redis.call('LINDEX', KEYS[1], 0) == job_id then
    pop_head()
    return
  end
  local place = number(job_fields(job_id, 'mf_place')[1])
  local index = place and find_near(job_id, place)
  if not index then
    redis.call('LREM', KEYS[1], 1, job_id)
    return
  end
  local head = pop_head()
  redis.call('LSET', KEYS[1], whole(index - 1), head)
  if redis.call('HEXISTS', key.waiting(model), head) == 1 then
    -- Not call: a stranger's value may be in the place of the job.
    redis.pcall('HSET', key.job(head), 'mf_place', whole(list_base() + index - 1))
  end
end

-- The same for those who may not look into the list, which names others' jobs, as a client of least
-- privilege: somebody who may sweeps it.
local function unlist(job_id)
  if type(redis.pcall('LINDEX', KEYS[1], 0)) == 'table' then
    redis.call('SADD', key.unlisted(model), job_id)
  else
    list_remove(job_id)
  end
end

local function sweep_list(limit)
  for _, job_id in ipairs(redis.call('SRANDMEMBER', key.unlisted(model), limit)) do
    list_remove(job_id)
    redis.call('SREM', key.unlisted(model), job_id)
  end
  -- Where rq's tools took the last one.
  if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('DEL', key.list_base(model)) end
end
