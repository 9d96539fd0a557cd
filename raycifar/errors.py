"""The two ways a command ends badly; both are shown to the user as one sentence."""

import click


class RequestError(click.ClickException):
    """The request was wrong, and nothing was started or written."""

    exit_code = 2


class WorkError(click.ClickException):
    """The work began and failed."""

    exit_code = 1
