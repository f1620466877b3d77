"""One peer in this process: ``python -m peers.run JOB.json OUT.json`` in ``benchmarks/``."""

import importlib
import json
import sys
from pathlib import Path

import torch

from peers.job import Job

MODULES = {
    "hf-lm-steer": "peers.hf_lm_steer",
    "hooks-eager": "peers.hooks_eager",
    "lora-r64": "peers.lora",
    "hotwire-vllm": "peers.hotwire_vllm",
    "vllm-lens": "peers.vllm_lens",
}


def main(job_file: str, out_file: str) -> None:
    """Measure and write the lines, with the number of threads that vLLM left to torch."""
    job = Job.read(Path(job_file))
    lines = importlib.import_module(MODULES[job.peer]).measure(job)
    Path(out_file).write_text(json.dumps({"rows": lines, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
