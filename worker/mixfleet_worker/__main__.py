"""``python -m mixfleet_worker``: the same as ``mixfleet worker``."""

from mixfleet_worker.cli import worker

if __name__ == "__main__":
    worker(prog_name="python -m mixfleet_worker")
