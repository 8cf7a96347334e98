"""
What the five scripts share: GPT-2's blocks, seeds, devices, folders of runs, tables and figures.

A script calls, in this order: parse_args, which reads the flags; sweep, which makes a Run for each
combination of their values; complete, which trains and measures each run, then prints the tables.

A run has a folder, out/<script>/<preset>,<flags that differ>,seed=N, with three files:
    ckpt.pt         all that training needs to go on: weights, optimizer, generators, metrics, flags
    metrics.jsonl   the metrics again, a line for each evaluation
    results.json    what was measured after training
A file is written under another name, then moved, so that a kill at any moment leaves either the old
file or the new one. To resume after any failure, repeat the command. To start anew, delete the
folder.

The models need the first section alone, GPT-2's blocks.
"""
import argparse
import ctypes
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- GPT-2's blocks (Radford et al. 2019), under GPT-2's parameter names ------------------------

class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention. ValueError if n_head does not divide n_embd."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}")
        self.n_head = n_head
        self.dropout = dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)          # queries, keys, values in one product
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, return_attn=False):
        """x (B, T, C) -> y (B, T, C), with return_attn also the attention weights (B, H, T, T)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, H, T, C/H) each
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        y = F.dropout(y, self.dropout, self.training)
        if not return_attn:
            return y
        future = torch.full((T, T), -math.inf, device=x.device).triu(1)
        return y, (q @ k.mT / math.sqrt(q.shape[-1]) + future).softmax(-1)

class MLP(nn.Module):
    """Two linear maps around a GELU (tanh approximation, as in GPT-2), hidden width 4 n_embd."""

    def __init__(self, n_embd, dropout=0.0):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))

class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd, dropout)

    def forward(self, x, return_attn=False):
        """x (B, T, C) -> x (B, T, C), with return_attn also the attention weights (B, H, T, T)."""
        y = self.attn(self.ln_1(x), return_attn)
        if return_attn:
            y, attn = y
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return (x, attn) if return_attn else x

@torch.no_grad()
def gpt2_init_(module, n_layer):
    """GPT-2's initialisation, in place: normal with standard deviation 0.02, 0.02 / sqrt(2 n_layer)
    in c_proj; biases of linear layers zero."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            residual = name.endswith("c_proj")               # writes to the residual stream
            m.weight.normal_(std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)
        if isinstance(m, nn.Linear) and m.bias is not None:
            m.bias.zero_()

# ---- Seeds and devices --------------------------------------------------------------------------

def seed_everything(seed):
    """Seeds initial weights and dropout. Each script draws its data from a generator of its own."""
    torch.manual_seed(seed)

def pick_device(name):
    """auto (CUDA if there is any), cpu, cuda or cuda:N -> torch.device; on CUDA, turns TF32 on.

    Makes the GPU current; on the CPU, keeps freed memory. Under torchrun, cuda is this process's
    own GPU. UsageError if there is no such device.
    """
    n_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    if name == "cuda" and n_gpus:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % n_gpus}"
    here = ["cpu"] + [f"cuda:{i}" for i in range(n_gpus)]
    if name not in here:
        raise UsageError(f"--device {name} is not available; available: {', '.join(here)}")
    if name == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")           # TF32
        torch.cuda.set_device(name)
    return torch.device(name)

def keep_freed_memory():
    """Tells glibc to keep freed memory: asking Linux for it again takes up to a fifth of a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)                          # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)                              # M_TOP_PAD
        libc.mallopt(-3, 2**25)                              # M_MMAP_THRESHOLD

# ---- The command line ---------------------------------------------------------------------------

class UsageError(ValueError):
    """The flags ask for something impossible: the command ends with this one line."""

class Help(argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it stands, and a list of defaults as one types it: 2 3 4."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or action.nargs == 0:             # nargs 0: a switch, without a value
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(str, values))})"

class Parser(argparse.ArgumentParser):
    """argparse, but an error is an exception, so that main(argv) can be called from Python."""

    def __init__(self, **settings):
        super().__init__(**settings, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UsageError(message)

def number(cast, low, high):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        value = cast(text)                                   # ValueError: argparse says "invalid"
        if not low <= value <= high:                         # true for nan, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value
    parse.__name__ = cast.__name__                           # argparse: "invalid int value: 'x'"
    return parse

positive_int = number(int, 1, 10**9)
positive_float = number(float, 1e-9, 1000)
non_negative = number(float, 0, 1000)
seed_int = number(int, 0, 2**62)

def parse_args(parser, presets, argv=None):
    """Adds the flags that all scripts have, and parses argv. A preset is a dict of defaults; flags
    beat it. UsageError for flags that are not understood."""
    add = parser.add_argument
    add("--preset", choices=list(presets), default="quick", help="the size")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out-dir", default="out", help="where the runs' folders are")
    add("--plot", action="store_true", help="draw the figures, too (needs matplotlib)")
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    first = Parser(add_help=False)                           # reads the preset alone
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset
    parser.set_defaults(**presets.get(preset, {}))           # before --help, which shows them
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        lists = [action.option_strings[0] for action in parser._actions if action.nargs == "+"]
        parser.error(f"not understood: {' '.join(unknown)} (several values: {' '.join(lists)})")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    args.device = str(pick_device(args.device))
    args.defaults = {key: parser.get_default(key) for key in vars(args)}
    return args

def command(main):
    """Runs main as a command: an error of use or of a file is one line, status 2. Status 1 if a run
    failed, 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)        # ? for what can't be shown
    try:
        status = int(any("failed" in result for result in main()))
    except (UsageError, RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        status = 130 if isinstance(error, KeyboardInterrupt) else 2
    sys.exit(status)

# ---- A run and its folder -----------------------------------------------------------------------

# Entries of args on which neither the trained model nor its results depend. A finished run keeps
# the evaluations that were made with its own eval_every.
NO_EFFECT = {"device", "out_dir", "plot", "eval_every", "defaults", "label"}

class RunError(Exception):
    """Ends one run with one line; the sweep goes on with the next."""

def write(path, data):
    """Writes bytes under another name, then moves the file, so that it is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())                          # on the disk, before it is moved
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                    # if the disk is full

def read_checkpoint(path):
    """Reads a ckpt.pt to the CPU. RunError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} is damaged: delete it to start anew") from error

class Run:
    """One run of a sweep: its args, its folder, its metrics (a dict for each evaluation).

    flags: those on which the results depend. settings: those on which training depends, which are
    the flags without those in `measured`, such as n_eval, that only the measurement uses.
    """

    def __init__(self, args, folder, measured=()):
        self.args = args
        self.folder = folder
        self.metrics = []
        self.saved_step, self.saved_at = 0, time.time()
        self.other_device = False
        self.flags = {key: x for key, x in vars(args).items() if key not in NO_EFFECT}
        self.settings = {key: x for key, x in self.flags.items() if key not in measured}

    def restore(self, model, optimizer, data):
        """Loads the checkpoint, if there is one, into what training changes, and returns the number
        of steps done. data: the torch.Generator of the data. RunError if the settings or the
        model differ, or if the checkpoint is damaged."""
        self.model, self.optimizer, self.data = model, optimizer, data
        self.dropout = torch.default_generator               # draws the dropout
        if self.args.device.startswith("cuda"):
            self.dropout = torch.cuda.default_generators[torch.cuda.current_device()]
        path = self.folder / "ckpt.pt"
        if path.exists():
            ckpt = read_checkpoint(path)
            if ckpt["settings"] != self.settings:
                raise RunError(f"{path} has other settings: give another --out-dir")
            try:
                model.load_state_dict(ckpt["model"])
            except RuntimeError as error:
                raise RunError(f"{path} is of another model: delete it to train anew") from error
            optimizer.load_state_dict(ckpt["optimizer"])
            try:
                data.set_state(ckpt["data"])
                self.dropout.set_state(ckpt["dropout"])
            except RuntimeError:                             # a GPU's, and this is the CPU
                self.other_device = True
            self.metrics, self.saved_step = ckpt["metrics"], ckpt["step"]
            print(f"{self.folder.name}: resumed at step {self.saved_step:,}")
        return self.saved_step

    def steps(self, start, stop):
        """range(start, stop) with a progress bar and a checkpoint at least once a minute.
        RunError if a run was begun on a GPU and would go on on the CPU, or the other way round."""
        steps = range(start, stop)
        if steps and self.other_device:
            raise RunError(f"{self.folder} was begun on another kind of device: resume it there")
        self.bar = tqdm(steps, initial=start, total=stop, desc=self.args.label, disable=None)
        for step in self.bar:
            yield step
            if time.time() - self.saved_at > 60:
                self.save(step + 1)

    def log(self, step, **metrics):
        """Keeps the metrics after `step` steps, shows the first two, and saves a checkpoint.
        RunError for a loss that is not finite."""
        self.check(metrics["loss"], "the loss", step)
        text = ", ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:2])
        self.bar.set_postfix_str(text)
        # without a terminal there is no bar, but about 16 lines a run
        sixteenth = self.bar.total / 16
        before = self.metrics[-1]["step"] if self.metrics else -1
        if self.bar.disable and step // sixteenth > before // sixteenth:
            print(f"{self.folder.name}, step {step:,}: {text}")
        self.metrics.append({"step": step, **metrics})
        self.save(step)

    def check(self, value, what, step):
        """RunError for a number that is not finite; the last checkpoint stays."""
        if not math.isfinite(value):
            raise RunError(f"{what} is {value} at step {step}: try less than --lr {self.args.lr}")

    def save(self, step):
        """Writes metrics.jsonl and ckpt.pt. RunError for weights that are not finite."""
        total = sum(w.detach().float().abs().sum() for w in self.model.parameters())
        self.check(float(total), "the sum of all weights", step)
        buffer = io.BytesIO()
        torch.save({
            "step": step, "settings": self.settings, "metrics": self.metrics,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "data": self.data.get_state(), "dropout": self.dropout.get_state(),
        }, buffer)
        lines = [json.dumps(line) + "\n" for line in self.metrics]
        write(self.folder / "metrics.jsonl", "".join(lines).encode())
        write(self.folder / "ckpt.pt", buffer.getvalue())
        self.saved_step, self.saved_at = step, time.time()

    def trained(self, build):
        """The task and the trained model, in eval mode, from memory: another process that runs the
        same command may have put the checkpoint back to an earlier step."""
        task, model = build(self.args)
        model.load_state_dict(self.model.state_dict())
        return task, model.eval()

    def read(self, edited):
        """Reads the results and the metrics. Returns None if there are none or they are damaged, or
        of other flags, or older than `edited`, a time."""
        path = self.folder / "results.json"
        try:
            results = json.loads(path.read_text())
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            metrics = [json.loads(line) for line in lines]
        except (FileNotFoundError, ValueError):
            return None
        if results["settings"] != self.flags or path.stat().st_mtime < edited:
            return None
        self.metrics = metrics
        return results

def load(folder, build, device="cpu"):
    """The task and the trained model of a run, in eval mode. build(args) -> task, model.

    FileNotFoundError if the folder holds no run, ValueError if it is another script's, RunError if
    its checkpoint is damaged.
    """
    path = Path(folder, "ckpt.pt")
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no trained run")
    ckpt = read_checkpoint(path)
    settings = argparse.Namespace(**ckpt["settings"], device=str(device))
    if settings.script != script_of(build).stem:
        raise ValueError(f"{folder} is a run of {settings.script}.py: load it with that")
    task, model = build(settings)
    model.load_state_dict(ckpt["model"])
    return task, model.eval()

# ---- Sweeps -------------------------------------------------------------------------------------

def script_of(function):
    """The file in which a function is defined."""
    return Path(function.__code__.co_filename)

def sweep(args, over, build, resolve=lambda args: None, measured=()):
    """A Run for each combination of the values of the flags in `over`; equal ones are one run.

    resolve(args) completes the flags of one run, in place. A flag that it sets to None has no
    effect on the run, and is not part of its name. `measured`: flags that training does not depend
    on. build(args) is tried for each run, so that an impossible one is a UsageError before anything
    is written.
    """
    unnamed = NO_EFFECT.union(measured, ["preset", "seed"])
    varied = [key for key in over if key != "seed" and len(getattr(args, key)) > 1]
    runs = {}
    for values in itertools.product(*[getattr(args, key) for key in over]):
        own = argparse.Namespace(**vars(args) | dict(zip(over, values)))
        # flags that differ from the preset, whose default is x or, if it takes several values, [x]
        typed = [key for key, x in vars(own).items()
                 if key not in unnamed and args.defaults[key] not in (x, [x])]
        resolve(own)                                         # what it fills in was not typed
        named = {key: x for key, x in vars(own).items() if x is not None}
        own.label = ", ".join(f"{key} {named[key]}" for key in varied if key in named)
        own.script = script_of(build).stem
        name = [own.preset] + [f"{key}={named[key]}" for key in typed if key in named]
        name = re.sub("[^A-Za-z0-9.,=+-]", "_", ",".join(name))
        if len(name) > 150:
            name = f"{name[:150]}-{zlib.crc32(name.encode()):08x}"
        folder = Path(args.out_dir, own.script, f"{name},seed={own.seed}")
        runs.setdefault(folder, Run(own, folder, measured))
    runs = list(runs.values())
    for key, default in args.defaults.items():
        if getattr(args, key) != default and all(getattr(run.args, key) is None for run in runs):
            raise UsageError(f"--{key.replace('_', '-')} has no effect on what was asked for")
    for run in runs:
        if not (run.folder / "results.json").exists():
            try:
                build(run.args)
            except (OSError, ValueError) as error:
                raise UsageError(f"{run.folder.name}: {error}") from error
    return runs

def last_edit(args, script):
    """The time of the last change to the code or to the data of --text, --sentences, --data-dir."""
    files = [Path(__file__), script]
    for key in ("text", "sentences", "data_dir"):
        path = getattr(args, key, None)
        if path:
            files += [Path(path), *Path(path).glob("*.csv")]             # and what a folder holds
    return max(file.stat().st_mtime for file in files if file.exists())  # a notebook has no file

def complete(runs, train, measure, show):
    """Trains and measures the runs without results, then calls show(runs) with all that have them.

    As `make` does, it makes results.json again from ckpt.pt if the code or the data is newer, see
    last_edit, or if flags that only the measurement depends on have changed. Returns a dict for
    each run: its results, its "folder" and, if it failed, "failed": the reason. Under
    torchrun each of WORLD_SIZE processes takes its part of the runs and shows nothing; repeat the
    command without torchrun to show all.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    runs = runs[rank::world]
    older = []                                               # folders trained before the last edit
    for run in runs:
        path = run.folder / "ckpt.pt"
        edited = last_edit(run.args, script_of(train))
        if path.exists() and path.stat().st_mtime < edited:
            older.append(run.folder)
        try:
            run.results = run.read(edited) or make_results(run, train, measure)
        except (RunError, OSError) as error:
            run.results = {"failed": str(error)}
            print(f"error: {run.folder}: {error}")
        except KeyboardInterrupt:
            kept = f"{run.folder} keeps step {run.saved_step:,}"
            raise KeyboardInterrupt(f"interrupted; {kept}: repeat the command to resume") from None
        run.results["folder"] = str(run.folder)
        run.model = run.optimizer = None                     # frees their memory
    done = [run for run in runs if "failed" not in run.results]
    if done and world == 1:
        show(done)
    for folder in older:
        print(f"{folder}: trained before the last edit, measured after; delete it to train anew")
    return [run.results for run in runs]

def make_results(run, train, measure):
    """Trains a run, or resumes it, measures it, and writes results.json."""
    seed_everything(run.args.seed)
    if getattr(run.args, "compile", False):
        torch.compiler.reset()                               # or it stops compiling after some runs
    train(run.args, run)
    results = {**measure(run.args, run), "settings": run.flags}  # all flags, not run.settings alone
    write(run.folder / "results.json", json.dumps(results, indent=1).encode())
    return results

# ---- Tables and figures -------------------------------------------------------------------------

def spread(values, form=".3f"):
    """Median and range, "0.95 [0.93, 0.97]", and - for None, a number that was not reached; a text
    stays as it is."""
    if isinstance(values[0], str):
        return values[0]
    values = [math.inf if value is None else value for value in values]
    found = statistics.median(values), min(values), max(values)
    median, low, high = ["-" if x == math.inf else f"{x:{form}}" for x in found]
    return median if low == high else f"{median} [{low}, {high}]"

def print_table(title, cells):
    """A table from cells (row, column, value) or (row, column, value, the number's format).

    Values with the same row and column are those of several seeds: one cell, median and range.
    """
    found = {}                                               # (row, column) -> values, [format]
    for row, column, value, *form in cells:
        values, _ = found.setdefault((str(row), str(column)), ([], form))
        values.append(value)
    rows, columns = [list(dict.fromkeys(names)) for names in zip(*found)]        # each name once
    lines = [["", *columns]]
    for row in rows:
        lines.append([row])
        for column in columns:
            values, form = found.get((row, column), ([""], []))
            lines[-1].append(spread(values, *form))
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))

def new_axes(titles, columns):
    """A figure, and an axis for each title."""
    from matplotlib.figure import Figure                     # not pyplot: a notebook may use it
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure((4.5 * columns, 3.5 * rows), layout="constrained")
    places = enumerate(titles, 1)
    return figure, [figure.add_subplot(rows, columns, i, title=title) for i, title in places]

def plot(path, panels, columns=3):
    """Draws panels {title: (settings of the axis, curves)}; a curve is (label, x, y, style).

    Curves with the same label and x are those of several seeds, drawn as their median in a band
    from the lowest to the highest. style: keyword arguments for axis.plot.
    """
    from matplotlib import colormaps
    figure, axes = new_axes(panels, columns)
    looks = dict(color=colormaps["tab10"].colors[:8], linestyle=["-", "--", "-.", ":"] * 2)
    for axis, (settings, curves) in zip(axes, panels.values()):
        axis.set_prop_cycle(**looks)                         # told apart in grey, too
        found = {}                                           # (label, x) -> ys of the seeds, style
        for label, x, y, style in curves:
            ys, _ = found.setdefault((label, tuple(x)), ([], style))
            ys.append(y)
        for (label, x), (ys, style) in found.items():
            ys = np.array(ys, dtype=float)                   # (seeds, len(x))
            [line] = axis.plot(x, np.median(ys, 0), label=label, **style)
            if len(ys) > 1:
                axis.fill_between(x, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.2)
        axis.set(**settings)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")

def plot_matrices(path, panels, columns=3):
    """Draws panels {title: (matrix, row names, column names, settings of the axis, circles)}.

    circles: pairs of row and column, marked in red.
    """
    figure, axes = new_axes(panels, columns)
    for axis, (matrix, rows, names, settings, circles) in zip(axes, panels.values()):
        axis.imshow(np.asarray(matrix), cmap="Greys", vmin=0, vmax=1)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.set_xticks(range(len(names)), names, fontsize=7)
        for row, column in circles:
            axis.plot(column, row, "o", color="red", fillstyle="none", markersize=5)
        axis.set(**settings)
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")

if __name__ == "__main__":
    sys.exit("common.py is not a script: run one of the five that import it")
