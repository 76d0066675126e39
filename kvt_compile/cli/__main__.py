"""`python -m kvt_compile.cli` is `kvt`."""

from kvt_compile.cli import main

main()
