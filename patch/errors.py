"""The one exception that means "the input is wrong": the command line prints its message as a single line."""


class UserError(ValueError):
    """Raised for anything a user can cause and mend; the message names the thing, the value and what to do."""
