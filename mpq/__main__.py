"""`python -m mpq` is the command `mpq`."""

from mpq.cli.commands import main

main()
