"""``python -m fastattn``: the same as the ``fastattn`` program."""

from fastattn.cli import main

main()
