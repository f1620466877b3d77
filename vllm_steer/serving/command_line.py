"""``--steer-config``, moved into ``additional_config`` when vLLM parses its command line.

This happens at parse time, because API server processes are started with the parsed arguments,
before a plugin is loaded in them.
"""

import argparse
import functools
from typing import Any

from vllm_steer.config import SteerConfig
from vllm_steer.environment import LOADING, RUST_FRONTEND, activate, uses_rust_frontend
from vllm_steer.errors import SteerError
from vllm_steer.serving.activation import activate_steering
from vllm_steer.serving.runtime.shared_folder import prepare_server

FLAG = "--steer-config"
MIDDLEWARE = "vllm_steer.serving.http.SteerMiddleware"


def add_steer_config_flag(parser: Any) -> Any:
    """Add the flag to a vLLM parser and fold its value in whenever that parser parses."""
    if any(FLAG in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group("SteerConfig", "Steering, by the vllm-steer plugin.")
    group.add_argument(
        FLAG,
        type=str,
        default=None,
        metavar="PATH_OR_JSON",
        help="Steers, presets, default and limits: a path to YAML or JSON, or inline JSON.",
    )
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_and_fold(*args: Any, **kwargs: Any) -> Any:
        namespace, unknown_args = parse(*args, **kwargs)
        try:
            fold(namespace)
        except SteerError as error:
            parser.error(str(error))
        return namespace, unknown_args

    parser.parse_known_args = parse_and_fold
    return parser


def fold(namespace: argparse.Namespace) -> None:
    """Move the flag's value to ``additional_config["steer"]`` and open the presets to HTTP.

    Raises ``SteerError`` for a config that cannot be read or that is given twice.
    """
    source = getattr(namespace, "steer_config", None)
    additional_config = getattr(namespace, "additional_config", None) or {}
    if source is not None:
        if "steer" in additional_config:
            raise SteerError(f"{FLAG} and additional_config['steer'] are both given; give one")
        namespace.additional_config = additional_config | {"steer": source}
        namespace.steer_config = None
    elif additional_config.get("steer") is None:
        return
    config = SteerConfig.load(namespace.additional_config["steer"])
    if hasattr(namespace, "middleware") and uses_rust_frontend():
        raise SteerError(
            f"{RUST_FRONTEND} is set, and vLLM's Rust frontend does not run the middleware that "
            f"reads a steer over HTTP; unset {RUST_FRONTEND}, or serve without a steer config"
        )
    # Before vLLM starts a fork server, whose children have the environment of its start.
    activate_steering(serves_dynamic=getattr(namespace, "speculative_config", None) is None)
    if config.runtime.enabled:
        activate(LOADING)
    if hasattr(namespace, "middleware"):
        prepare_server(config.runtime)
    if hasattr(namespace, "middleware") and MIDDLEWARE not in namespace.middleware:
        namespace.middleware = [*namespace.middleware, MIDDLEWARE]
    if hasattr(namespace, "middleware") or _runs_batch(namespace):
        _serve_presets(namespace, config)


def _runs_batch(namespace: argparse.Namespace) -> bool:
    """True for the command ``run-batch``."""
    return hasattr(namespace, "input_file") and hasattr(namespace, "output_file")


def _serve_presets(namespace: argparse.Namespace, config: SteerConfig) -> None:
    """List ``BASE:preset`` beside each served name."""
    if not config.presets:
        return
    model = getattr(namespace, "model_tag", None) or namespace.model
    names = list(namespace.served_model_name or [model])
    bases = [name for name in names if not _names_preset(name, names, config)]
    listed = [f"{base}:{preset}" for base in bases for preset in sorted(config.presets)]
    namespace.served_model_name = names + [name for name in listed if name not in names]


def _names_preset(name: str, names: list[str], config: SteerConfig) -> bool:
    """True if a name is ``BASE:preset`` of a served one; ``SteerError`` if BASE is unknown."""
    base, colon, preset = name.rpartition(":")
    if not colon or preset not in config.presets:
        return False
    if base not in names:
        raise SteerError(
            f"the served model name {name} looks like preset {preset} of a model {base}, which "
            "is not "
            "served; rename the model or the preset"
        )
    return True
