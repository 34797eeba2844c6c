"""``python -m mixfleet`` is the ``mixfleet`` command."""

from mixfleet.cli import main

main(prog_name="mixfleet")
