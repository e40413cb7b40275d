"""The command ``osscar``, as ``python -m osscar`` is: it hears of signals before it imports."""

from osscar.base.process import ends_at_once, handling


def main() -> None:
    """Run the command line."""
    with handling(ends_at_once):
        from osscar.cli import main as run

        run()


if __name__ == "__main__":
    main()
