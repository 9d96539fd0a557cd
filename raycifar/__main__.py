"""`python -m raycifar` is the console script."""

from raycifar.cli import main

main()
