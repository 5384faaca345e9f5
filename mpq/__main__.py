"""`python -m mpq` is the command `mpq`."""

from mpq.cli.main import main

main()
