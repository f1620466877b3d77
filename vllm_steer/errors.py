"""The project's exceptions.

ValueError
└── SteerError            a steer file, a config or a request is wrong
    └── SteerRequestError a request's ``steer`` value is wrong
"""


class SteerError(ValueError):
    """A steer file, a steer config or a request that cannot be served as it stands."""


class SteerRequestError(SteerError):
    """A request's ``steer`` value that names something unknown or out of range."""
