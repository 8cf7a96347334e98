"""A sweep of each script, killed ten times at random moments, ends in the same results as one that nobody disturbed."""
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SWEEPS = {
    "random_transformer": ["--task", "parens", "needle", "--train", "embeddings", "--n-embd", "32", "--size", "6", "--batch-size", "32",
                           "--steps", "300", "--eval-every", "15"],
    "hop_induction": ["--n-layer", "2", "3", "--n-embd", "32", "--seq-len", "16", "--max-hops", "2", "--steps", "250", "--eval-every", "12",
                      "--dropout", "0.1", "--n-train", "100"],
    "looped_icl": ["--model", "looped", "standard", "--n-layer", "4", "--n-embd", "32", "--steps", "125", "--eval-every", "6"],
    "ntp_convergence": ["--steps", "8000", "--seed", "0", "1"],
    "memory_birth": ["--seq-len", "32", "--batch-size", "32", "--steps", "250", "--eval-every", "12", "--triggers", "fixed", "random"],
}


def results(folder):
    """What each finished run of a folder found, and its metrics, by its name."""
    return {path.parent.name: (path.read_text(), (path.parent / "metrics.jsonl").read_text())
            for path in folder.glob("*/*/results.json")}


def n_evaluations(folder):
    """How many evaluations the runs of a folder keep."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/*/metrics.jsonl"))


def disturbed_sweep(name, folder, n_kills=10):
    """Runs the sweep undisturbed, and killed n_kills times; returns both results, and how many of the kills hit a run."""
    rng = random.Random(name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out):
        return [sys.executable, "-u", str(ROOT / f"{name}.py"), *SWEEPS[name], "--device", "cpu", "--out-dir", str(folder / out)]
    done = subprocess.run(command("whole"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for _ in range(n_kills):
        before = n_evaluations(folder / "killed")
        process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if rng.random() < 0.2:                                                   # anywhere, perhaps before it trains
            time.sleep(5 * rng.random())
        else:                                                                    # somewhere after its next evaluation
            while n_evaluations(folder / "killed") == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(0.4 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"{name} ended before it was killed {n_kills} times"
    unfinished = len(results(folder / "killed")) < len(results(folder / "whole"))
    done = subprocess.run(command("killed"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return results(folder / "whole"), results(folder / "killed"), unfinished


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    with ThreadPoolExecutor(len(SWEEPS)) as pool:
        outcomes = dict(zip(SWEEPS, pool.map(lambda name: disturbed_sweep(name, tmp_path / name), SWEEPS)))
    for name, (whole, killed, unfinished) in outcomes.items():
        assert len(whole) == 2 and whole == killed, name
        assert unfinished, f"{name}: the last kills came after the end"
