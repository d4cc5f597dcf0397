"""Write the text that model.kvcal was calibrated on: tests of the running Python's standard library, which the model
never saw.

    python calibration_text.py > calibration.txt
    kvcomp calibrate . --text calibration.txt --windows 32 --scored-tokens 256 --context 2304 -o anew.kvcal

An older version made model.kvcal, without prices for a budget.

No evaluation uses them: those take the files in held_out.txt, or the Python manual.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from kvcomp.evaluate.text import held_out_names

CHARACTERS = 1_500_000
EVERY = 5  # files of which one is taken


def main() -> None:
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    files = sorted(folder.glob("test_*.py"))[::EVERY]
    if not files:
        sys.exit(f"this Python has no {folder}: Debian and Ubuntu have it in libpython3-testsuite")
    held_out = set(held_out_names(Path(__file__).parent / "held_out.txt"))
    left = CHARACTERS
    for file in files:
        if f"test/{file.name}" not in held_out and left > 0:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            sys.stdout.write(text[:left])
            left -= len(text)


if __name__ == "__main__":
    main()
