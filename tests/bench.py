"""
Speed of each script's training step: python tests/bench.py [--device cpu|cuda] [--threads N] [script ...]
What --dtype bfloat16 buys on this machine: python tests/bench.py --dtype float32 bfloat16
What --compile buys on it: python tests/bench.py --compile

Prints milliseconds a step, the share of it that goes into sampling, and the GFLOP/s that the step achieves beside those of
a large float32 matrix product, measured in the same run before and after it; "times" is a step's time over that of the
script's first row. Operations are those of the matrix products that the step executes (torch's FlopCounterMode): attention that is written
out counts its whole T x T square, torch's fused attention on a CPU and elementwise work count nothing.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common

# script and variant: the setting that is timed
NEEDLE = ["--preset", "paper", "--task", "needle", "--train", "embeddings", "--n-embd", "256", "--batch-size", "250"]
LOOPED = ["--preset", "paper", "--dims-start", "20", "--points-start", "41", "--eval-every", "1000000"]
SETTINGS = {"random_transformer": [*NEEDLE, "--eval-every", "1000000"],
            "looped_icl": [*LOOPED, "--model", "looped", "--loops-every", "1"], "looped_icl standard": [*LOOPED, "--model", "standard"],
            "memory_birth": ["--preset", "paper", "--eval-every", "1000000"],
            "hop_induction": ["--preset", "paper", "--n-layer", "4", "--eval-every", "1000000"],
            "ntp_convergence": ["--steps-ov", "1", "--steps", "500"]}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device, least=1.0):
    """Median time of a call, over at least 5 calls and `least` seconds."""
    times = []
    function()
    while len(times) < 5 or sum(times) < least:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_product(device, n=4096):
    """GFLOP/s of an n x n float32 product."""
    a = torch.randn(n, n, device=device)
    return 2e-9 * n**3 / seconds(lambda: a @ a, device)


class Stopwatch(common.Run):
    """A run that keeps nothing, and times each step of the script's own training loop."""
    def restore(self, model, optimizer, data):
        self.metrics, self.times, self.flops = [], [], 0
        return 0

    def log(self, step, **metrics):
        self.metrics.append({"step": step, **metrics})

    def save(self, step):
        pass

    def steps(self, start, stop):
        for step in range(start, stop):                                          # the last step evaluates as well
            synchronize(torch.device(self.args.device))
            begin = time.perf_counter()
            if step == 6 and not getattr(self.args, "compile", False):   # all loops of looped_icl; ntp_convergence does not evaluate
                with FlopCounterMode(display=False) as counter:
                    yield step
                self.flops = counter.get_total_flops()
            else:
                yield step
            synchronize(torch.device(self.args.device))
            self.times.append(time.perf_counter() - begin)
        self.times = self.times[7:-1]


def bench(name, device, steps, dtype, compiled):
    """Times one script; returns a row of the table, and the seconds of a step. Operations are not counted if it is compiled."""
    script = __import__(name.split()[0])
    with tempfile.TemporaryDirectory() as folder:
        own = [] if name == "ntp_convergence" else ["--dtype", dtype] + ["--compile"] * compiled
        flags = ["--device", str(device), "--steps", str(steps), "--out-dir", folder, *own, *SETTINGS[name]]
        args = script.parse_args(flags)
        first = common.sweep(args, script.SWEEP, script.build, script.resolve)[0]
        run = Stopwatch(first.args, first.folder)
        torch.compiler.reset()
        before = matrix_product(device)
        script.train(run.args, run)
        after = matrix_product(device)
    task, data, step = script.build(run.args)[0], torch.Generator(device).manual_seed(0), statistics.median(run.times)
    if name.startswith("looped_icl"):
        sampling = seconds(lambda: task.sample(run.args.batch_size, run.args.n_points, data), device)
    else:                                                                        # ntp_convergence: the dataset is the batch
        sampling = seconds(lambda: task.sample(run.args.batch_size, data), device) if hasattr(task, "sample") else 0
    product = (before + after) / 2
    kind = (dtype if own else "float64") + ", compiled" * compiled
    cells = {"setting": " ".join(SETTINGS[name]), "kind": kind, "ms a step": f"{1e3 * step:.1f}", "sampling": f"{100 * sampling / step:.1f}%"}
    if not compiled:
        cells.update({"GFLOP a step": f"{1e-9 * run.flops:.1f}", "GFLOP/s": f"{1e-9 * run.flops / step:.0f}",
                      "matrix product": f"{product:.0f}", "fraction": f"{100e-9 * run.flops / step / product:.0f}%"})
    return cells, step


def bench_all(names, device, steps, kinds):
    """Prints what each script's step costs for each kind (dtype, compiled), and a step's time over that of the first kind."""
    cells = []
    for name in names:
        first = None
        for dtype, compiled in kinds[:1] if name == "ntp_convergence" else kinds:
            row, step = bench(name, device, steps, dtype, compiled)
            first = first or step
            print(f"{name}: {row.pop('setting')}", flush=True)
            title = f"{name}, {row.pop('kind')}"
            cells += [(title, column, text) for column, text in {**row, "times": f"{step / first:.2f}"}.items()]
    common.print_table("a step", cells)


def savings(device):
    """What random_transformer leaves out of a step of NEEDLE, and what each omission buys; rows of a table."""
    script = __import__("random_transformer")
    args = script.parse_args(["--device", str(device), *NEEDLE])
    task, model = script.build(common.sweep(args, script.SWEEP, script.build, script.resolve)[0].args)
    trained, data = script.train_only(model, "embeddings"), torch.Generator(device).manual_seed(0)

    def step(gradients, everywhere, padding):
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(gradients or any(parameter is other for other in trained))
        tokens, scored = (F.pad(x, (0, padding)) for x in task.sample(args.batch_size, data))
        at, targets = script.answers(tokens, scored, 1)
        logits = model(tokens[:, :-1], None if everywhere else at)
        if everywhere:
            logits = logits.gather(1, at[..., None].expand(-1, -1, task.vocab_size))
        task.losses(logits, targets, tokens).mean().backward()

    pad = task.block_size + 1 - task.sample(1, data)[0].shape[1]
    cases = {"as it is": (False, False, 0), "and gradients of frozen weights": (True, False, 0),
             "or the last block everywhere": (False, True, 0), "or padding to all positions": (False, False, pad),
             "all three": (True, True, pad)}
    times = {name: seconds(lambda: step(*case), device) for name, case in cases.items()}
    for name, time in times.items():
        yield name, "ms", f"{1e3 * time:.0f}"
        yield name, "times", f"{time / times['as it is']:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="*", default=[name.split()[0] for name in SETTINGS], help="names without .py; default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=common.number(int, 9, 10**6), default=14,
                        help="steps; the first seven warm up and the last one evaluates")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="as the scripts' flag")
    parser.add_argument("--compile", action="store_true", help="compiled as well")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = common.pick_device(flags.device)
    names = [name for name in SETTINGS if name.split()[0] in flags.script]
    unknown = set(flags.script) - {name.split()[0] for name in SETTINGS}
    if unknown:
        parser.error(f"no script: {', '.join(sorted(unknown))}; names are without .py")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads")
    kinds = [(dtype, compiled) for dtype in flags.dtype for compiled in [False, True][:1 + flags.compile]]
    bench_all(names, device, flags.steps, kinds)
    if "random_transformer" in flags.script:
        title = "random_transformer, the same setting: forward and backward with what the script leaves out"
        common.print_table(title, savings(device))
