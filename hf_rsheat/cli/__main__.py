"""`python -m hf_rsheat.cli` is `hf-rsheat`."""

from . import main

main()
