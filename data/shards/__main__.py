"""Entry point of `python -m data.shards`."""

import sys

from common.console import set_up_console
from data.shards.command_line import main

if __name__ == "__main__":
    set_up_console()
    sys.exit(main())
