"""What a person did wrong, told without a traceback."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The command line prints its message and exits with status 2; it never shows a traceback for it. The message says
    where (file and line, or the config's key), what was expected, what was found, and what to do.
    """


class ConfigError(UserError):
    """A config file or an override that cannot be used."""


class DataError(UserError):
    """A data file that cannot be used."""
