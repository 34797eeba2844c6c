"""``make bench``: everything that runs on this machine, one after the other."""

from benchmarks import fleet

fleet.main()
