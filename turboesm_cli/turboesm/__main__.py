"""`python -m turboesm`: the command line."""

from __future__ import annotations

from turboesm_cli.app import main

main()
