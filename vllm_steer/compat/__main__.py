"""``python -m vllm_steer.compat [OLD NEW]``: names that are missing, or what changed.

Without arguments: how many names each feature needs, and which the installed vLLM lacks; the exit
code is 1 if there are any. With two versions, each ``installed``, a wheel of vLLM or a folder that
one was unpacked to: what changed in the definitions of these names.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import get_args

from vllm_steer.compat.difference import differences
from vllm_steer.compat.features import all_names, missing_in
from vllm_steer.compat.versions import SUPPORTED, installed_version
from vllm_steer.compat.vllm_name import Feature, VllmName
from vllm_steer.compat.vllm_source import INSTALLED, VllmSource
from vllm_steer.errors import SteerError


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    if len(arguments) not in (0, 2):
        print((__doc__ or "").splitlines()[0], file=sys.stderr)
        return 2
    try:
        return _compare(*arguments) if arguments else _check()
    except SteerError as error:
        print(f"vllm-steer: {error}", file=sys.stderr)
        return 2


def _check() -> int:
    version = installed_version()
    missing = missing_in(VllmSource.of(INSTALLED), version, all_names())
    print(f"vLLM {version}; vllm-steer supports {SUPPORTED}")
    for feature in get_args(Feature):
        names = [name for name in all_names() if name.feature == feature]
        missing_names = [name for name in missing if name.feature == feature]
        print(f"{feature}: {len(names)} names, {_missing_lines(missing_names)}")
    return 1 if missing else 0


def _missing_lines(missing: Iterable[VllmName]) -> str:
    lines = [f"\n  missing: {name.module}:{name.path} ({name.use})" for name in missing]
    return "".join(lines) or "all there"


def _compare(old: str, new: str) -> int:
    num_differences = 0
    for name, difference in differences(VllmSource.of(old), VllmSource.of(new)):
        num_differences += 1
        print(f"{name.module}:{name.path} ({name.use}, {name.feature})\n{difference}\n")
    print(f"{num_differences} of {len(all_names())} definitions differ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
