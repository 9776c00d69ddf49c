"""`python -m corda.cli` is the console script."""

from corda.cli import main

main()
