"""Commands without a Trainer."""

import argparse
from typing import NoReturn

from kvc.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of leaving the process."""
        raise UserError(f"{message}; see {self.prog} --help")
