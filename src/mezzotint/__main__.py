"""Run the command line: `python -m mezzotint`."""

from mezzotint.cli import main

main()
