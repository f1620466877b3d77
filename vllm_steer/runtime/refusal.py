"""Why a change at run time was refused."""

from typing import Final

from vllm_steer.errors import SteerError

BAD_REQUEST: Final = 400
NO_RIGHT: Final = 401
NOT_FOUND: Final = 404
CONFLICT: Final = 409
TOO_LARGE: Final = 413
UNFIT: Final = 422


class Refused(SteerError):
    """A change that was refused; nothing has changed. ``status`` is that of HTTP."""

    def __init__(self, message: str, status: int = UNFIT) -> None:
        super().__init__(message)
        self.status = status
