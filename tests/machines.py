"""The suite as other machines would run it: python -m tests.machines [--only SETTING,SETTING] [pytest arguments]

Threads, instruction sets and libraries change the order and the number of roundings in every sum. Each setting below makes
this machine round as another one does, as far as a variable reaches; a line each says what came of it, and build/machines has
the logs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

LOGS = Path("build/machines")

# The least that ATen, MKL, oneDNN, NumPy's OpenBLAS (which multiplies for Triton's interpreter) and the extension can do.
PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "CELLATTN_ISA": "portable",
}

FOUR_THREADS = {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"}  # on fewer cores too

SETTINGS: dict[str, dict[str, str]] = {
    "as-it-is": {},
    "threads-1": {"OMP_NUM_THREADS": "1"},
    "threads-2": {"OMP_NUM_THREADS": "2"},
    "threads-4": FOUR_THREADS,
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "mkl-sse": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},  # heeded by Intel's processors alone
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "openblas-haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "avx2": {"CELLATTN_ISA": "avx2"},
    "portable": {"CELLATTN_ISA": "portable"},
    "plain-1": {**PLAIN, "OMP_NUM_THREADS": "1"},
    "plain-4": {**PLAIN, **FOUR_THREADS},
}


def run(name: str, part: str, arguments: list[str], **more: str) -> tuple[bool, str]:
    """Whether pytest found nothing wrong, and its last line."""
    log = LOGS / f"{name}-{part}.log"
    env = {key: value for key, value in os.environ.items() if key not in {k for s in SETTINGS.values() for k in s}}
    with log.open("w") as out:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, env={**env, **SETTINGS[name], **more}, stdout=out, stderr=subprocess.STDOUT)
    lines = log.read_text().splitlines()
    return done.returncode in (0, 5), lines[-1] if lines else "no output"  # 5: nothing was selected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SETTINGS), help="settings, by default all: %(default)s")
    chosen, arguments = parser.parse_known_args()
    names = chosen.only.split(",")
    if unknown := set(names) - set(SETTINGS):
        parser.error(f"--only: expected some of {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
    LOGS.mkdir(parents=True, exist_ok=True)
    width, wrong = max(map(len, SETTINGS)), 0
    for name in names:
        start = time.monotonic()
        parts = [run(name, "suite", arguments)]
        if not arguments:
            parts.append(run(name, "interpreter", ["tests/interpreter"], TRITON_INTERPRET="1"))
        good = all(ok for ok, _ in parts)
        wrong += not good
        said = "; ".join(line.strip("= ") for _, line in parts)
        print(f"{'ok' if good else 'FAILED':6} {name:{width}} {time.monotonic() - start:6.0f} s  {said}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
