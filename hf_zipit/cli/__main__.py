"""`python -m hf_zipit.cli`, for launchers that start modules and no scripts."""

from hf_zipit.cli import main

main()
