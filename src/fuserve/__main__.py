"""``python -m fuserve``: the ``fuserve`` command."""

from fuserve.cli.main import main

main()
