"""
What the five scripts share: GPT-2's blocks, seeds, devices, the command line, the folder of a run.

To lift: GPT-2's blocks need torch alone; compile_step, print_table, spread and new_figure nothing
else of this file; the command line needs pick_device; runs need all but blocks and tables.
"""
import argparse
import ctypes
import datetime
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                          # Windows: no lock on a run's folder
    fcntl = None

# ---- GPT-2's blocks (Radford et al. 2019), under GPT-2's parameter names ------------------------

class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention. ValueError where n_head does not divide n_embd."""

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
    """GPT-2's initialisation, in place: N(0, 0.02), c_proj 0.02 / sqrt(2 n_layer), biases zero."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            residual = name.endswith("c_proj")               # writes to the residual stream
            m.weight.normal_(std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)
        if isinstance(m, nn.Linear) and m.bias is not None:
            m.bias.zero_()

# ---- Seeds, devices, compilation ----------------------------------------------------------------

def seed_everything(seed):
    """Seeds torch's global generators: initial weights and dropout. Data has its own generators."""
    torch.manual_seed(seed)

def pick_device(name, kinds=("cuda", "mps", "cpu")):
    """auto (the first of `kinds` that is here), cpu, cuda, cuda:N or mps -> torch.device.

    Under torchrun, cuda is this process's own GPU. On CUDA, matrix products then use TF32; on a
    CPU, malloc keeps freed memory. ValueError where there is no such device.
    """
    mps = int(torch.backends.mps.is_available())
    counts = {"cuda": torch.cuda.device_count(), "mps": mps, "cpu": 1}
    counts = {kind: counts[kind] for kind in kinds}
    if name == "auto":
        name = next(kind for kind in kinds if counts[kind])
    kind, colon, index = name.partition(":")
    readable = index.isdecimal() or not colon                # "cuda:" and "cuda:x" are not
    if not readable or int(index or 0) >= counts.get(kind, 0):
        there = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ValueError(f"{name} is not here; there are {there}")
    if kind == "cpu":
        keep_freed_memory()
    if kind != "cuda":
        return torch.device(kind)
    torch.set_float32_matmul_precision("high")               # TF32
    rank = int(os.environ.get("LOCAL_RANK", 0))
    index = int(index) if index else rank % counts["cuda"]
    torch.cuda.set_device(index)                             # for streams and graphs, as well
    return torch.device("cuda", index)

def keep_freed_memory():
    """Tells glibc to keep what is freed: to get new pages takes up to a fifth of a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)                          # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)                              # M_TOP_PAD
        libc.mallopt(-3, 2**25)                              # M_MMAP_THRESHOLD

def compile_step(step, model, *generators):
    """--compile: torch.compile for the model and, on CUDA, all of step() as one CUDA graph.

    Small models are bound by the launching of kernels; a graph launches a whole step at once.
    step() has no arguments, may return the loss, works on tensors that stay in place (the learning
    rate, too) and draws from `generators`. Its first three calls run eagerly, as a capture needs
    them to; they train as well.
    """
    model.compile()
    if not next(model.parameters()).is_cuda:
        return step

    def calls():
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()                         # the default one cannot be captured
        torch.cuda.set_stream(stream)
        for _ in range(3):
            yield step()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):         # records, does not run
            loss = step()
        while True:
            graph.replay()
            yield loss
    return calls().__next__                                  # a call goes on to the next yield

# ---- The command line ---------------------------------------------------------------------------

def number(cast, low, high):
    """argparse type: a number, int or float by `cast`, from low to high."""
    def parse(text):
        value = cast(text)                                   # ValueError: argparse says "invalid"
        if not low <= value <= high:                         # nan is not, either
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return value
    parse.__name__ = cast.__name__                           # argparse: "invalid int value: 'x'"
    return parse

positive_int = number(int, 1, 10**9)
positive_float = number(float, 1e-9, 1000)                   # a learning rate
non_negative = number(float, 0, 1000)                        # a weight decay
seed_int = number(int, 0, 2**62)

def data_path(text):
    """argparse type: a file or folder of data. A run records a hash of what it holds."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"there is no {text!r}")
    return Path(text)

class Help(argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it stands, and defaults as they would be typed."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help                               # 0 is not False: it is shown
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, values))})"

def make_parser(main):
    """A parser whose help is the docstring of main's module; that file names the runs' folder."""
    parser = argparse.ArgumentParser(
        description=main.__globals__["__doc__"],
        formatter_class=Help,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,                             # errors are one line
    )
    parser.set_defaults(script=Path(main.__code__.co_filename))
    return parser

def parse_args(parser, presets, argv=None, without=(), devices=("cuda", "mps", "cpu")):
    """Adds the flags that every script has, but those in `without`; flags beat the preset.

    Adds .script, the script's path, .given, the names of the flags on the command line, and .usual,
    what all flags are where none is given.
    """
    def add(flag, **settings):
        if flag not in without:
            parser.add_argument(flag, **settings)
    how = "minutes, up to an hour, the paper's setting"
    add("--preset", choices=list(presets), default="quick", help=how)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile; on CUDA one graph a step")
    add("--eval-every", type=positive_int, default=100, help="steps between two evaluations")
    add("--out-dir", default="out", help="OUT_DIR/<script>/<preset>,<what differs>,seed=N/")
    add("--overwrite", action="store_true", help="start anew and replace what those folders hold")
    add("--plot", action="store_true", help="draw the figure, too (needs matplotlib)")
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    no_help = [word for word in argv if word not in ("-h", "--help")]
    preset = parser.parse_args(no_help).preset
    parser.set_defaults(**presets[preset])
    usual = vars(parser.parse_args(["--preset", preset]))
    # argparse leaves alone what a namespace has: what is still None was not on the command line
    asked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(usual)))
    given = {key: value for key, value in vars(asked).items() if value is not None}
    args = argparse.Namespace(**{**usual, **given})
    args.usual = usual
    args.given = list(given)
    parent = Path(args.out_dir).absolute()
    while not os.path.exists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        parser.error(f"--out-dir {args.out_dir}: {parent} is no folder that can be written to")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        args.device = str(pick_device(args.device, devices))
    except ValueError as error:
        parser.error(f"--device {error}")
    return args

def refuse_others(parser, args, mode, *used):
    """One line for flags that have no effect on `mode`, a flag that trains nothing."""
    for flag in args.given:
        if flag not in (mode, "preset", "device", *used):
            parser.error(f"--{flag} has no effect on --{mode}: leave it out".replace("_", "-"))

def fail(message, code=1):
    """Ends the program with one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)

GO_ON = "the same command goes on from what the folders hold (without --overwrite)"

def command(main):
    """Runs main as a command: an interruption or a closed output ends it with one line."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        line, code = stop.args or ("interrupted", 130)
        fail(line, code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)         # what Python flushes at its end
        fail(f"the output was closed; {GO_ON}")

# ---- Tables and figures -------------------------------------------------------------------------

def print_table(header, rows, keys=1, width=100):
    """Prints rows of strings under a header, columns aligned to the right.

    A wider table is printed in parts, each of which begins with the first `keys` columns.
    """
    columns = []
    for cells in zip(header, *rows, strict=True):
        longest = max(map(len, cells))
        columns.append(["  " + cell.rjust(longest) for cell in cells])
    parts = [columns[:keys]]
    for column in columns[keys:]:
        too_wide = sum(len(c[0]) for c in parts[-1] + [column]) > width + 2
        if too_wide and len(parts[-1]) > keys:
            parts.append(columns[:keys])
        parts[-1] = parts[-1] + [column]
    for part in parts:
        for line in zip(*part):
            print("".join(line)[2:])

def spread(values, form=".3f"):
    """Median and range over seeds, "0.95 [0.93, 0.97]"; - stands for None, a number not reached."""
    def text(x):
        if x == math.inf:
            return "-"
        between = form == ".0f" and x != round(x)            # the median of two counts
        return f"{x:.1f}" if between else f"{x:{form}}"

    values = [math.inf if value is None else value for value in values]
    median, low, high = text(statistics.median(values)), text(min(values)), text(max(values))
    return median if low == high else f"{median} [{low}, {high}]"

def by_setting(runs, results):
    """Groups runs that differ in their seed alone: pairs of the first's args, all results."""
    groups = {}
    for run, result in zip(runs, results):
        args, group = groups.setdefault(run.name.rpartition(",seed=")[0], (run.args, []))
        group.append(result)
    return list(groups.values())

def new_figure(rows=1, columns=1, width=4.5, height=3.5):
    """A figure and its axes (rows, columns), each width x height inches."""
    from matplotlib.figure import Figure                     # not pyplot: a notebook may use it
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)

def save_figure(figure, runs, name):
    """Writes a sweep's figure beside its runs, as <name>,<sweep>.png."""
    path = runs[0].folder.parent / f"{name},{runs[0].sweep}.png"
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")

# ---- A run and its folder -----------------------------------------------------------------------

# What training does not depend on, beside what a script names as only measured
NOT_TRAINED = {"device", "eval_every", "out_dir", "overwrite", "plot", "preset"}
NOT_TRAINED |= {"given", "script", "usual"}                  # what parse_args adds

class RunError(Exception):
    """What ends one run with one line, while its sweep goes on."""

class Run:
    """One run of a sweep: config.json, metrics.jsonl, ckpt.pt and, once finished, results.json."""

    in_step = False                                          # training is within a step: let it end
    caught = 0                                               # the signal that came meanwhile

    def __init__(self, args, folder, sweep, measured):
        self.args = args
        self.folder = folder
        self.name = folder.name
        self.sweep = sweep                                   # the name of all the runs together
        self.measured = {key: getattr(args, key) for key in measured}
        self.number = ""                                     # "2/4", once they are counted
        apart = NOT_TRAINED.union(measured)
        settings = {key: value for key, value in vars(args).items() if key not in apart}
        self.config = {
            "settings": {key: str(x) if isinstance(x, Path) else x for key, x in settings.items()},
            "data": {key: fingerprint(x) for key, x in settings.items() if isinstance(x, Path)},
            "code": fingerprint(args.script) + fingerprint(Path(__file__)),
            "eval_every": getattr(args, "eval_every", None),
            "device": torch.device(args.device).type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def read(self, name):
        """A JSON file of the folder, of .jsonl the list of its lines; None where there is none."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            if name.endswith(".jsonl"):
                return [json.loads(line) for line in path.read_text().splitlines()]
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); --overwrite starts anew") from None

    def write(self, name, content):
        """Writes bytes, or what JSON can hold, to a file: under another name, then moved."""
        if not isinstance(content, bytes):
            content = json.dumps(content, indent=1).encode()
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except OSError:                                      # a full disk is not to be filled more
            temporary.unlink(missing_ok=True)
            raise

    def say(self, text, *parts):
        """A line on what happens to the run, and which of these `parts` of its config changed.
        Returns those."""
        there = self.read("config.json") or {}
        changed = [part for part in parts if there.get(part) != self.config[part]]
        if changed:
            text += f"; changed since: {', '.join(changed)}; --overwrite starts anew"
        mixed = there.get("changed_on_the_way")
        if mixed:
            text += f"; changed on the way: {', '.join(mixed)}"
        print(f"{self.number} {self.name}: {text}", flush=True)
        return changed

    def restore(self, **objects):
        """Takes what training changes (model, optimizer, generators), and loads the checkpoint.

        Returns the step to go on from. With --overwrite the old files go here, where the new run is
        ready to start.
        """
        if self.args.overwrite:
            for name in ["results.json", "ckpt.pt", "metrics.jsonl", "config.json"]:
                (self.folder / name).unlink(missing_ok=True)
        device = torch.device(self.args.device)
        dropout = torch.default_generator
        if device.type == "cuda":
            dropout = torch.cuda.default_generators[device.index]
        self.objects = {**objects, "dropout": dropout}
        state = {"step": 0, "seconds": 0}
        config = {**self.config, "measured": self.measured}
        path = self.folder / "ckpt.pt"
        if path.exists():
            there = self.read("config.json") or {}
            begun_on = there.get("device", device.type)
            if begun_on != device.type:                      # generators differ
                raise RunError(f"begun on {begun_on}: give --device {begun_on}, or --overwrite")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                for name, thing in self.objects.items():
                    generator = isinstance(thing, torch.Generator)
                    load_state = thing.set_state if generator else thing.load_state_dict
                    load_state(state[name])
            except (MemoryError, OSError):
                raise
            except Exception as error:                       # of many kinds, for a damaged file
                reason = f"{path} does not fit: {error}".partition("\n")[0]
                raise RunError(f"{reason}; --overwrite starts anew") from None
            changed = self.say(f"continues at step {state['step']:,}", *self.config)
            before = there.get("changed_on_the_way", [])
            config["changed_on_the_way"] = sorted({*before, *changed})
        else:
            self.say("new")
        self.write("config.json", config)
        lines = self.read("metrics.jsonl") if path.exists() else None
        self.metrics = [line for line in lines or [] if line["step"] <= state["step"]]
        self.started = time.perf_counter() - state["seconds"]
        return state["step"]

    def save(self, step):
        """Writes ckpt.pt: all that the steps to come depend on. RunError for weights of nan."""
        state = {"step": step, "seconds": time.perf_counter() - self.started}
        for name, thing in self.objects.items():
            generator = isinstance(thing, torch.Generator)
            state[name] = thing.get_state() if generator else thing.state_dict()
        total = sum(w.float().abs().sum() for w in state["model"].values())
        self.check(total.item(), "the sum of all weights", step)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write("ckpt.pt", buffer.getvalue())

    def check(self, value, what, step):
        """RunError for a number that is not finite, with what to try."""
        if not math.isfinite(value):
            kept = "its last checkpoint stays" if (self.folder / "ckpt.pt").exists() else "unsaved"
            rates = {key: x for key, x in vars(self.args).items() if key.startswith("lr") and x}
            tried = " or ".join(f"--{key} {x}".replace("_", "-") for key, x in rates.items())
            raise RunError(f"{what} is {value} at step {step} ({kept}); try less than {tried}")

    def steps(self, start, stop):
        """range(start, stop) with a progress bar. Ctrl-C and SIGTERM end it after a step, saved."""
        steps = range(start, stop)
        self.bar = tqdm(steps, initial=start, total=stop, desc=self.number, disable=None)
        Run.in_step = True
        try:
            for step in self.bar:
                yield step
                if Run.caught:
                    line = f"interrupted, saved at step {step + 1:,}; the same command continues it"
                    line += " (without --overwrite)" if self.args.overwrite else ""
                    try:
                        self.save(step + 1)
                    except OSError as error:                 # a full disk
                        line = f"interrupted, not saved: {error}; {GO_ON}"
                    raise KeyboardInterrupt(line, 128 + Run.caught)
        finally:
            Run.in_step = False
            self.bar.close()

    def log(self, step, **metrics):
        """Adds a line to metrics.jsonl and shows its first two numbers: loss and main metric."""
        self.check(metrics["loss"], "the loss", step)
        seconds = round(time.perf_counter() - self.started, 2)
        self.metrics.append({"step": step, "seconds": seconds, **metrics})
        lines = [json.dumps(line) + "\n" for line in self.metrics]
        self.write("metrics.jsonl", "".join(lines).encode())
        shown = list(metrics.items())[:2]
        text = ", ".join(f"{key} {value:.4g}" for key, value in shown)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"{self.number} step {step:,}: {text}", flush=True)

def fingerprint(path):
    """A hash of a file, or of a folder's files, names and contents."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]

def folder_name(settings, usual, apart):
    """The preset and what differs from it; what is longer than 160 characters ends in a hash."""
    name = settings["preset"]
    for key, value in settings.items():
        if key not in apart and value is not None and value != usual[key]:
            items = value if isinstance(value, list) else [value]
            name += f",{key}=" + "+".join(map(str, items))
    name = re.sub(r"[^\w.,=+-]", "_", name)
    if len(name) > 160:
        name = f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name

def sweep(args, over, resolve, measured=()):
    """The product of the lists in args that `over` names: a Run for each different training.

    resolve(args) completes the settings of one run in place: what a preset leaves to the model or
    the task, and None for what has no effect. `measured`: what training does not depend on.
    """
    apart = NOT_TRAINED.union(measured)
    script = args.script.stem if args.script.is_file() else "stdin"
    whole = folder_name(vars(args), args.usual, apart)
    runs = {}
    for values in itertools.product(*[getattr(args, key) for key in over]):
        picked = dict(zip(over, values))
        own = argparse.Namespace(**{**vars(args), **picked})
        usual = argparse.Namespace(**{**args.usual, **picked})
        # The name says what differs from `usual`: the preset's values, completed for the same task
        # and model. A swept value that is not the preset's only one is always named.
        resolve(own)
        resolve(usual)
        for key in over:
            if args.usual[key] != [picked[key]]:
                setattr(usual, key, None)
        name = folder_name(vars(own), vars(usual), apart | {"seed"})
        folder = Path(args.out_dir) / script / f"{name},seed={own.seed}"
        if folder not in runs:
            runs[folder] = Run(own, folder, whole, measured)
    runs = list(runs.values())
    for key in args.given:
        if all(getattr(run.args, key) is None for run in runs):
            flag = "--" + key.replace("_", "-")
            fail(f"{flag} has no effect on what was asked for: leave it out (--help: what for)", 2)
    for i, run in enumerate(runs):
        run.number = f"{i + 1}/{len(runs)}"
    return runs

def load(folder, build, device="cpu"):
    """A run's task and its trained model, in eval mode. build(args) -> task, model.
    FileNotFoundError where the folder holds no run."""
    if not (Path(folder) / "ckpt.pt").exists():
        raise FileNotFoundError(f"{folder} holds no trained run")
    config = json.loads((Path(folder) / "config.json").read_text())
    for key, digest in config["data"].items():
        path = Path(config["settings"][key])
        if fingerprint(path) != digest:
            print(f"{folder}: {path} has changed since training", file=sys.stderr)
    task, model = build(argparse.Namespace(**config["settings"], device=str(device)))
    state = torch.load(Path(folder) / "ckpt.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    return task, model.eval()

def caught(number, frame):
    """Ctrl-C and SIGTERM: the first within a training step waits for its end, in Run.steps."""
    if Run.in_step and not Run.caught:
        Run.caught = number
    else:
        raise KeyboardInterrupt(f"interrupted; {GO_ON}", 128 + number)

def bring_up_to_date(run, train, measure):
    """Trains and measures a run, or what of that its folder does not hold yet."""
    old = None if run.args.overwrite else run.read("results.json")
    again = []
    if old is None:
        seed_everything(run.args.seed)
        train(run.args, run)
    else:
        for key, value in run.measured.items():
            if value and value != old["measured"].get(key):
                again.append(key)
        there = run.read("config.json") or {}
        same_settings = there.get("settings") == run.config["settings"]      # else build() may fail
        if same_settings and old.get("code") != run.config["code"]:
            again.append("the changed code")
        how = f"measured again for {', '.join(again)}" if again else "read"
        parts = "settings", "code", "data", "eval_every"
        run.say(f"finished on {old['finished'][:10]}, {how}", *parts)
    if again or old is None:
        print(f"{run.number} measuring", flush=True)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        about = {"finished": now, "measured": run.measured, "code": run.config["code"]}
        run.write("results.json", {**about, **measure(run.args, run)})

def hold_alone(file):
    """Locks a file until it is closed. BlockingIOError where another process holds it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{file.name}: no locks here; leave the folder to one command", flush=True)

def attempt(run, train, measure):
    """Brings a run up to date, alone in its folder. Returns whether it succeeded."""
    Run.in_step = False
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / ".lock", "a+") as lock:       # locked until it is closed
            hold_alone(lock)
            lock.truncate(0)
            print(f"process {os.getpid()}", file=lock, flush=True)
            bring_up_to_date(run, train, measure)
        return True
    except BrokenPipeError:
        raise                                                # nobody reads the output: command()
    except BlockingIOError:
        holder = (run.folder / ".lock").read_text().strip()
        reason = f"{holder} is at work on it; later, {GO_ON}"
    except RunError as error:
        reason = str(error)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        place = f"{Path(ours.filename).name}, line {ours.lineno}"
        reason = f"{type(error).__name__}: {str(error).strip()[:200]} ({place})".replace("\n", " ")
    finally:
        run.objects = None                                   # frees the model and the optimizer
    print(f"error: {run.number} {run.name}: {reason}", file=sys.stderr, flush=True)
    return False

def complete(runs, train, measure, show):
    """Trains and measures the runs that need it, and calls show(runs, results) with all of them.

    train(args, run) leaves a checkpoint; measure(args, run) returns a dict for results.json. Under
    torchrun each process takes its share, and rank 0 shows all. Returns the results, each with its
    run's folder. A run that fails is left out; the program then ends with exit status 1.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, caught)
    try:
        Run.caught = 0
        failed = {run.name for run in runs[rank::world] if not attempt(run, train, measure)}
        if world > 1:
            of_each = [None] * world
            torch.distributed.all_gather_object(of_each, failed)             # waits for all
            failed = set().union(*of_each)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if world > 1:
            torch.distributed.destroy_process_group()        # else its threads can abort the exit
    if rank > 0:
        return []
    done = [run for run in runs if run.name not in failed and run.read("results.json")]
    results = [{**run.read("results.json"), "folder": str(run.folder)} for run in done]
    if done:
        show(done, results)
    if len(done) < len(runs):
        fail(f"{len(runs) - len(done)} of {len(runs)} runs did not finish")
    return results
