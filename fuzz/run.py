"""Run fuzz targets, two at a time: 30,000 inputs each as CI does, or for as long as you like.

    python fuzz/run.py                                  # make fuzz
    python fuzz/run.py --inputs 0 --seconds 1800 --seed 0 --corpus ~/kvcomp-corpus

An input that is refused or decoded wrongly lands in fuzz/found; run the target on it to see it again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
TARGETS = "block", "value", "container"
DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+)")


def run(target: str, inputs: int, seconds: int, seed: int, corpus: Path) -> tuple[str, bool]:
    """What one target came to, and whether it held."""
    script, found = HERE / f"fuzz_{target}.py", HERE / "found"
    (corpus / target).mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    command = [sys.executable, str(script), "-max_len=16384", "-timeout=20", "-rss_limit_mb=4096"]
    command += [f"-artifact_prefix={found}/{target}-", f"-seed={seed}"]
    command += [f"-runs={inputs}"] * (inputs > 0) + [f"-max_total_time={seconds}"] * (seconds > 0)
    begin = time.perf_counter()
    ended = subprocess.run([*command, str(corpus / target)], capture_output=True, text=True, check=False)
    took, done = time.perf_counter() - begin, DONE.search(ended.stderr)
    if ended.returncode or done is None:
        return f"{target}: FAILED\n{ended.stderr[-3000:]}\nagain: python {script} {found}/{target}-<name>", False
    return (
        f"{target}: {int(done[1]):,} inputs in {took:.0f} s, all decoded or refused; {done[2]} places of the code seen",
        True,
    )


def main(
    targets: Annotated[list[str] | None, typer.Argument(help="Some of block, value, container; all if none")] = None,
    inputs: Annotated[int, typer.Option(help="Inputs for each target, 0 for no limit")] = 30_000,
    seconds: Annotated[int, typer.Option(help="Seconds for each target, 0 for no limit")] = 0,
    seed: Annotated[int, typer.Option(help="Of the fuzzer; 0 draws one")] = 1,
    corpus: Annotated[Path | None, typer.Option(help="Keeps what the fuzzer learns from one run to the next")] = None,
) -> None:
    """Fuzz, and fail if a target does."""
    wanted = targets or list(TARGETS)
    if set(wanted) - set(TARGETS) or (not inputs and not seconds):
        raise typer.BadParameter(f"targets are {', '.join(TARGETS)}, and inputs or seconds must be above 0")
    with tempfile.TemporaryDirectory() as empty, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run, target, inputs, seconds, seed, corpus or Path(empty)) for target in wanted]
        held = []
        for one in running:
            text, holds = one.result()
            print(text, flush=True)
            held.append(holds)
    if not all(held):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
