"""``python -m osscar`` is the command ``osscar``."""

from osscar.cli import main

if __name__ == "__main__":
    main()
