"""``python -m autocomp``."""

from autocomp.cli import main

main()
