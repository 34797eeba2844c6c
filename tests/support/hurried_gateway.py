"""``mixfleet`` with a gateway that gives requests less time to arrive, for tests.

Usage: hurried_gateway.py SECONDS gateway [OPTIONS]
"""

import sys

from mixfleet.cli import main
from mixfleet_broker.gateway import connection_guard

if __name__ == "__main__":
    connection_guard.__dict__["REQUEST_S"] = float(sys.argv.pop(1))
    main()
