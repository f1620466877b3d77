"""The project's exceptions.

ValueError
└── SteerError                a steer file, a config, a request or a command's input is wrong
    ├── SteerRequestError     a request's ``steer`` value is wrong
    └── JudgeUnavailableError an evaluation's judge needs a model or a package that is missing
"""

from typing import Final

from vllm_steer.untrusted_text import message as shown_message
from vllm_steer.untrusted_text import printable

_LONGEST_CAUSE: Final = 200


class SteerError(ValueError):
    """A steer file, a steer config or a request that cannot be served as it stands.

    Its message is one printable line of at most 1,000 characters, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown_message(message))


class SteerRequestError(SteerError):
    """A request's ``steer`` value that names something unknown or out of range."""


class JudgeUnavailableError(SteerError):
    """A valid judge whose model, package or service is unavailable."""


def cause(error: BaseException) -> str:
    """Why a library failed, in one line: some libraries answer with a page of advice."""
    text = error.strerror if isinstance(error, OSError) else None
    text = (text or str(error)).strip() or type(error).__name__
    return printable(text.splitlines()[0], _LONGEST_CAUSE)
