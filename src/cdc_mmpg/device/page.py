"""`cdc-mmpg web`: the libraries of the browser's page, installed by npm and copied into its vendor/ folder.

The page needs no build: it imports these files as they are. Licences: onnxruntime-web MIT, @huggingface/tokenizers
Apache-2.0, mediabunny MPL-2.0.
"""

import argparse
import gzip
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.files import atomic_write, hash_file
from cdc_mmpg.program import log_to_terminal, run_to_exit_code

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "web"
VENDOR = PAGE / "vendor"
# Files of the packages that the page loads, by their names in vendor/.
LIBRARIES = {
    "ort.mjs": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers.mjs": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "mediabunny.mjs": "mediabunny/dist/bundles/mediabunny.min.mjs",
}
# Modules whose types the copies have, for the type checker.
TYPES = {
    "ort.d.mts": "onnxruntime-web/wasm",
    "tokenizers.d.mts": "@huggingface/tokenizers",
    "mediabunny.d.mts": "mediabunny",
}
STAMP = VENDOR / "package-lock.sha256"  # digest of the lock file whose versions are in vendor/
INSTALL_SECONDS = 600
DEVICE_FOLDERS = {"float32": "device", "int8": "device-int8"}  # bundles of an export, by the precision of the encoder
DEMO_FOLDER, DEMO_FILE = "demo", "session.json"  # of an export: the clips and questions of one device


def main(arguments: Sequence[str]) -> int:
    """Install the libraries unless they are there; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optional", action="store_true", help="only warn if they cannot be installed")
    options = parser.parse_args(arguments)

    def run() -> None:
        try:
            print(f"{VENDOR}: {install():,} bytes, as browsers load them")
        except ConfigError as error:
            if not options.optional:
                raise
            logger.warning("the export is not tried as a browser runs it: %s", error)

    log_to_terminal()
    return run_to_exit_code(run)


def install() -> int:
    """Install the libraries unless they are there; return the number of bytes that a browser loads.

    Raises:
        ConfigError: npm is missing or fails.
    """
    if not are_installed():
        run_npm()
        VENDOR.mkdir(exist_ok=True)
        for name, source in LIBRARIES.items():
            shutil.copyfile(PAGE / "node_modules" / source, VENDOR / name)
            (VENDOR / f"{name}.gz").write_bytes(gzip.compress((VENDOR / name).read_bytes(), mtime=0))
        for name, module in TYPES.items():
            (VENDOR / name).write_text(f'export * from "{module}";\n', encoding="utf-8")
        with atomic_write(STAMP) as file:
            file.write(hash_file(PAGE / "package-lock.json").encode())
    return sum((VENDOR / f"{name}.gz").stat().st_size for name in LIBRARIES)


def are_installed() -> bool:
    """Return whether vendor/ holds the versions of the lock file."""
    return STAMP.is_file() and STAMP.read_text(encoding="utf-8") == hash_file(PAGE / "package-lock.json")


def run_npm() -> None:
    """Install the packages of the lock file into node_modules/.

    Raises:
        ConfigError: npm is missing or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError("the browser's page needs libraries from npm: install Node.js 20 or newer (nodejs.org)")
    try:
        subprocess.run([npm, "ci"], cwd=PAGE, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"npm ci failed in {PAGE}:\n{error.stderr.strip()[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"npm ci in {PAGE} took longer than {INSTALL_SECONDS} s: is the registry reachable?"
        ) from error
