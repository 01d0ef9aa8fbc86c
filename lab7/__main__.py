"""The command line: python -m lab7 train | sample | evaluate | render | report | …"""

import os
import sys

from tyro.extras import SubcommandApp

from lab7.errors import UserError


def main() -> None:
    """Run a command; what the user can mend is one line on standard error and exit code 2."""
    from workshop.commands import COMMANDS

    app = SubcommandApp()
    for command in COMMANDS:
        app.command(command, name=command.__name__.replace("_", "-"))
    try:
        try:
            app.cli(prog="python -m lab7", description="Conditional DDPM on i-CLEVR.")
        finally:
            sys.stdout.flush()  # what fails in it shall fail here
    except BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
