"`python -m asamoe` is the command `asamoe`."
import sys

from asamoe.cli import main

if __name__ == '__main__': sys.exit(main())
