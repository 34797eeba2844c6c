-- uses: privileged
-- Append a chunk where a plain XADD was refused for want of memory: this script may go over the
-- limit, so that a full Redis can drain.
--
-- KEYS[1]  rq's list of the queue
-- ARGV     1 model, 2 job id, 3 event id, 4 body
-- Result   the event's id, or false where the job has no channel
-- Keeps    Redis itself refuses an id that is not above all in the channel.

return redis.call('XADD', key.channel(ARGV[2]), 'NOMKSTREAM', ARGV[3], 'k', 't', 'd', ARGV[4])
