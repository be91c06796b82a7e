import sys

from harness.cli import main

if __name__ == "__main__":  # cells import this module again under another name
    sys.exit(main())
