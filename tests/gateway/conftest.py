"""All tests in this folder need a real Redis."""

from support.redis_server import redis as redis
from support.redis_server import redis_server as redis_server
from support.redis_server import redis_url as redis_url
