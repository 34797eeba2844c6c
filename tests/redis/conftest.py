"""All tests in this folder need a real server."""

from support.lua_clock import lua_clock as lua_clock
from support.redis_server import no_redis as no_redis
from support.redis_server import redis as redis
from support.redis_server import redis_server as redis_server
from support.redis_server import redis_url as redis_url
from support.rq_tools import exporting as exporting
from support.rq_tools import hardened as hardened
from support.rq_tools import rq_python as rq_python
from support.rq_tools import tools as tools
