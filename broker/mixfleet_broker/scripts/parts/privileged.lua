-- For workers, gateways and operators. A client of least privilege may not look into rq's list: it is
-- refused here, before anything is changed, and not half-way (a script is not rolled back).
redis.call('LINDEX', KEYS[1], 0)
