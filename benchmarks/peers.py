"""The libraries, each in an environment of its own: ``python -m benchmarks.peers setup``.

Environments lie under ``.bench/envs``, outside what is tracked. A library that does not install is
told, and the table says so; ``python -m benchmarks.peers list`` shows what is there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.problems import FOLDER

ADAPTERS = Path(__file__).parent / "adapters"
#: what every adapter needs beside its library
COMMON = ("numpy", "pandas>=2.3", "pyarrow>=18")


@dataclass(frozen=True)
class Library:
    """A library: its distribution with version, and its adapter."""

    name: str
    requirement: str
    adapter: str

    @property
    def folder(self) -> Path:
        """Its environment."""
        return FOLDER / "envs" / self.name

    @property
    def command(self) -> list[str] | None:
        """What runs its adapter; None where it is not installed."""
        if self.name == "lmmjax":
            return [sys.executable, str(ADAPTERS / self.adapter)]
        if self.name == "lme4":
            rscript = shutil.which("Rscript")
            return [rscript, str(ADAPTERS / self.adapter)] if rscript and self.version else None
        ready = (self.folder / "installed").exists()
        return [str(self.folder / "bin/python"), str(ADAPTERS / self.adapter)] if ready else None

    @property
    def version(self) -> str:
        """The version installed, empty where it is not."""
        if self.name == "lmmjax":
            from importlib.metadata import version

            return version("lmmjax")
        if self.name == "lme4":
            return _output("Rscript", "-e", "cat(as.character(packageVersion('lme4')))")
        name = self.requirement.split("==")[0]
        code = f"from importlib.metadata import version; print(version({name!r}))"
        return _output(str(self.folder / "bin/python"), "-c", code)


def _output(*command: str) -> str:
    """What a command prints; empty where it is missing or fails."""
    if not (shutil.which(command[0]) or Path(command[0]).exists()):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


LIBRARIES = (
    Library("lmmjax", "lmmjax", "with_lmmjax.py"),
    Library("glmm", "glmm==0.6.2", "with_glmm.py"),
    Library("mixedlm-rs", "mixedlm-rs==0.2.0", "with_mixedlm_rs.py"),
    Library("lme-python", "lme-python==0.2.7", "with_lme_python.py"),
    Library("mixedlm", "mixedlm==1.3.0", "with_mixedlm.py"),
    Library("statsmodels", "statsmodels==0.15.0", "with_statsmodels.py"),
    Library("gpboost", "gpboost==1.8.0", "with_gpboost.py"),
    Library("lme4", "lme4", "with_lme4.R"),
)


def setup() -> int:
    """Make the environments that are missing; returns how many could not be made."""
    failed = 0
    for library in LIBRARIES:
        if library.name in ("lmmjax", "lme4"):
            continue
        stamp = library.folder / "installed"
        if stamp.exists() and stamp.read_text() == library.requirement:
            continue
        failed += not _install(library, stamp)
    return failed


def _install(library: Library, stamp: Path) -> bool:
    python = str(library.folder / "bin/python")
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(library.folder)],
        [python, "-m", "pip", "install", "--quiet", library.requirement, *COMMON],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{library.name}: {done.stderr.strip()[-400:]}", file=sys.stderr)
            return False
    stamp.write_text(library.requirement)
    print(f"{library.name}: {library.version}")
    return True


def show() -> None:
    """Print what is installed."""
    for library in LIBRARIES:
        print(f"{library.name:12s} {library.version or 'not installed'}")


def main() -> int:
    """Make or list the environments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("action", choices=["setup", "list"])
    if parser.parse_args().action == "setup":
        setup()
    show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
