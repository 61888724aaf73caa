"""`python -m afd_server` is `afd-server`."""

from afd_server.cli import main

main()
