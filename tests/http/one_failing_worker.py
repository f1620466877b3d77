"""``vllm``, where one worker cannot read steers: ``python one_failing_worker.py serve ...``.

As long as the file that ``VLLM_STEER_TEST_FAIL`` names exists, the worker that is first to read one
writes its process id into it and fails, then and later. The server's other processes import this
module too.
"""

import os
from contextlib import suppress
from pathlib import Path

FAIL = "VLLM_STEER_TEST_FAIL"


def _fail_in_one_process(flag: Path) -> None:
    from vllm_steer.planned_steer import PlannedSteer
    from vllm_steer.steers import Steer

    load = PlannedSteer.load

    def load_or_fail(self: PlannedSteer, *, verifies: bool = True) -> Steer:
        if flag.exists():
            claim = flag.with_suffix(".pid")
            with suppress(FileExistsError), claim.open("x") as file:  # the first worker fails
                file.write(str(os.getpid()))
            if claim.read_text() == str(os.getpid()):
                raise PermissionError("this worker may not read it")
        return load(self, verifies=verifies)

    PlannedSteer.load = load_or_fail  # type: ignore[method-assign]


_fail_in_one_process(Path(os.environ[FAIL]))

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
