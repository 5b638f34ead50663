"""Entry point of `python -m data.prepare`."""

import sys

from common.console import set_up_console
from data.prepare.prepare import main

if __name__ == "__main__":
    set_up_console(may_vanish=True)
    sys.exit(main())
