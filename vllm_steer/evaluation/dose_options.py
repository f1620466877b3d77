"""Options of the doses of an evaluation, and the conditions that they name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vllm_steer.config import LONGEST_NAME, NAME, NO_STEER
from vllm_steer.errors import SteerError
from vllm_steer.files import load_steer
from vllm_steer.request import read_dose
from vllm_steer.request.gates import check_gate
from vllm_steer.steers import ConditionSteer, Steer
from vllm_steer.steers.content import content_digest
from vllm_steer.untrusted_text import shown


def load_conditions(
    files: Mapping[str, Path], *, taken: Collection[str] = ()
) -> dict[str, ConditionSteer]:
    """The conditions of some files by name.

    Raises ``SteerError`` for a name that is ``taken`` or that a request cannot give, and for a
    steer of another kind.
    """
    conditions: dict[str, ConditionSteer] = {}
    for name, path in files.items():
        if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or name == NO_STEER:
            raise SteerError(
                f"condition {shown(name)} is not a valid name; use letters, digits, '_', '.', '-'"
            )
        if name in taken:
            raise SteerError(f"condition {name} has the name of a steer; give it another")
        steer = load_steer(path)
        if not isinstance(steer, ConditionSteer):
            raise SteerError(
                f"condition {name}: {path} is of kind {steer.kind}; expected a file of kind "
                f"{ConditionSteer.kind}, such as one of vllm-steer fit condition"
            )
        conditions[name] = steer
    return conditions


def check_dose(
    name: str,
    options: Mapping[str, Any],
    steer: Steer,
    conditions: Mapping[str, ConditionSteer],
) -> None:
    """Raise ``SteerError`` for a dose that is invalid in a request."""
    dose = read_dose(name, options, steer)
    check_gate(dose, steer, {name: steer, **conditions})


def conditions_metadata(
    conditions: Mapping[str, ConditionSteer], files: Mapping[str, Path]
) -> dict[str, Any]:
    """What determines the verdicts, as an entry of a run's settings; empty without conditions."""
    entries = {
        name: {"file": files[name].name, "sha256": content_digest(steer)}
        for name, steer in conditions.items()
    }
    return {"conditions": entries} if entries else {}
