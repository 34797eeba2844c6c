-- uses: rates
-- Put an inquiry before the model's workers, if one lives.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 inquiry id, 3 body (msgpack), 4 ms within which it is to be answered, 5 most
--          inquiries waiting, 6 ms after which a list that nobody reads goes away
-- Result   {'asked', waiting}      it waits, `waiting` of them with it
--          {'no_worker', 0}        no worker of the model lives
--          {'full', waiting}       too many wait
-- Keeps    the list short and short-lived; refused means that it was not changed.

local inquiries = key.inquiries(model)
local _, _, num_alive = capacity()
if num_alive == 0 then return {'no_worker', 0} end
local waiting = redis.call('LLEN', inquiries)
if waiting >= tonumber(ARGV[5]) then return {'full', waiting} end
waiting = redis.call('RPUSH', inquiries, whole(now_ms + tonumber(ARGV[4])) .. ARGV[2] .. ARGV[3])
redis.call('PEXPIRE', inquiries, ARGV[6])
return {'asked', waiting}
