"""What the five scripts share: GPT-2's blocks, seeding, devices, the command line, and the folder of a run."""
import argparse, ctypes, datetime, importlib.util, io, itertools, json, math, os, platform, signal, statistics, sys, time
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
from tqdm import tqdm

# ---- GPT-2's blocks (Radford et al. 2019), under GPT-2's parameter names --------------------------------------------
class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention. ValueError where n_head does not divide n_embd."""
    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}")
        self.n_head, self.dropout = n_head, dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)                              # queries, keys and values in one
        self.c_proj = nn.Linear(n_embd, n_embd)
    def forward(self, x, return_attn=False):
        """x (B, T, C) -> y (B, T, C), or with return_attn the pair y, attention weights (B, H, T, T)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)      # (B, H, T, C/H) each
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=True)
        y = F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)
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
        """x (B, T, C) -> x (B, T, C), or with return_attn the pair x, attention weights (B, H, T, T)."""
        y, attn = self.attn(self.ln_1(x), return_attn=True) if return_attn else (self.attn(self.ln_1(x)), None)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return (x, attn) if return_attn else x

@torch.no_grad()
def gpt2_init_(module, n_layer):
    """GPT-2's initialisation, in place: N(0, 0.02), output projections N(0, 0.02 / sqrt(2 n_layer)), biases zero."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            m.weight.normal_(std=0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj") else 0.02)
        if isinstance(m, nn.Linear) and m.bias is not None:
            m.bias.zero_()

# ---- Seeds, devices, compilation ------------------------------------------------------------------------------------
def seed_everything(seed):
    """Seeds torch's global generators: initial weights and dropout. Data is drawn from generators of its own."""
    torch.manual_seed(seed)

def pick_device(name):
    """auto, cpu, cuda, cuda:N or mps -> torch.device; under torchrun, cuda is this process's GPU. ValueError."""
    counts = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()), cpu=1)
    kind, colon, index = (next(kind for kind in counts if counts[kind]) if name == "auto" else name).partition(":")
    if colon and not index.isdecimal() or int(index or 0) >= counts.get(kind, 0):
        raise ValueError(f"{name}: there is none here, but " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")                               # TF32
        return torch.device("cuda", int(index or int(os.environ.get("LOCAL_RANK", 0)) % counts["cuda"]))
    if platform.libc_ver()[0] == "glibc":         # keep freed memory: fresh pages cost a CPU step a tenth of its time
        list(map(ctypes.CDLL(None).mallopt, (-1, -2, -3), (2**31 - 1, 2**28, 2**25)))   # trim, top pad, mmap threshold
    return torch.device(kind)

def compile_step(step, model, *generators):
    """--compile: torch.compile for the model and, on CUDA, all of step() as one CUDA graph: launches cost most there.
    step() has no arguments, returns the loss, works on tensors that stay in place (a changing learning rate, too) and
    draws from `generators`. Its first three calls run eagerly, as a capture needs them to; they train as well."""
    def calls():
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())                               # the default one cannot be captured
        for _ in range(3):
            yield step()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):                                            # records, does not run
            loss = step()
        while True:
            graph.replay()
            yield loss
    model.compile()
    return calls().__next__ if next(model.parameters()).is_cuda else step

# ---- The command line -----------------------------------------------------------------------------------------------
def positive_int(text):
    """argparse type: an integer of at least 1."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")

def parse_args(parser, presets, argv=None):
    """Adds the flags that every script has, puts the preset beneath the explicit flags, and picks the device."""
    parser.usage, add = argparse.SUPPRESS, parser.add_argument_group("the run").add_argument     # errors of one line
    add("--preset", choices=list(presets), default="quick", help="quick: minutes on a CPU; paper: its own setting")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile, and on CUDA the whole step in one CUDA graph")
    add("--eval-every", type=positive_int, default=100, help="steps between evaluations, each followed by a checkpoint")
    add("--out-dir", default="out", help="a run's folder is OUT_DIR/<script>/<what the sweep varies>")
    add("--overwrite", action="store_true", help="start anew and replace what those folders hold")
    add("--plot", action="store_true", help="draw the figure, too (needs matplotlib)")
    parser.set_defaults(**presets["quick"])
    parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        args.device = str(pick_device(args.device))
    except ValueError as error:
        parser.error(f"--device {error}")
    return args

def print_table(header, rows):
    """Prints rows of strings under a header, columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))

def spread(values, form=".3f"):
    """Median and range of numbers over seeds as text, "0.95 [0.93, 0.97]"; - stands for None, a number not reached."""
    values = [math.inf if value is None else value for value in values]
    three = min(values), statistics.median(values), max(values)
    low, mid, high = (f"{x:{form}}" if x < math.inf else "-" for x in three)
    return mid if low == high else f"{mid} [{low}, {high}]"

# ---- A run and its folder -------------------------------------------------------------------------------------------
def fail(message, code=1):
    """Ends the program with one line."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)

class Run:
    """One run of a sweep and its folder: config.json, metrics.jsonl, ckpt.pt and, when finished, results.json."""
    signals = []                                                                 # caught so far, see complete()
    def __init__(self, args, folder):
        self.args, self.folder, self.name, self.bar = args, folder, folder.name, None
        self.config = {**vars(args), "device": torch.device(args.device).type, "torch": torch.__version__}
        for name in ["results.json", "ckpt.pt", "metrics.jsonl", "config.json"] if args.overwrite else []:
            (folder / name).exists() and (folder / name).unlink()
        free = {"out_dir", "overwrite", "plot", "preset", "torch", *(["device"] if self.read("results.json") else [])}
        there = self.read("config.json") or self.config
        differ = [f"{key} ({there.get(key)} there, {value} here)" for key, value in self.config.items()
                  if key not in free and json.dumps(value) != json.dumps(there.get(key))]
        if differ:
            fail(f"{folder} holds a run with other settings: {', '.join(differ)}. --overwrite replaces it, another "
                 "--out-dir keeps both", 2)

    def read(self, name):
        """A JSON file of the folder (of .jsonl the list of its lines), or None where there is none."""
        if not (self.folder / name).is_file():
            return None
        text = (self.folder / name).read_text()
        return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)

    def write(self, name, content):
        """Writes a file of the folder whole: under a temporary name, then moved into place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.tmp").write_bytes(content)
        os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def restore(self, **objects):
        """Names what training changes (model, optimizer, generators), loads the checkpoint if any, returns its step."""
        path, state, device = self.folder / "ckpt.pt", {}, torch.device(self.args.device)
        dropout = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        self.objects = {**objects, "dropout": dropout}
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            for key, thing in self.objects.items():
                (getattr(thing, "set_state", None) or thing.load_state_dict)(state[key])
        self.metrics = [line for line in self.read("metrics.jsonl") or [] if line["step"] <= state.get("step", -1)]
        self.started = time.perf_counter() - state.get("seconds", 0)
        return state.get("step", 0)

    def save(self, step):
        """Writes ckpt.pt: all that the steps to come depend on."""
        state = {key: (getattr(thing, "get_state", None) or thing.state_dict)() for key, thing in self.objects.items()}
        torch.save({"step": step, "seconds": time.perf_counter() - self.started, **state}, buffer := io.BytesIO())
        self.write("ckpt.pt", buffer.getvalue())

    def steps(self, start, stop):
        """range(start, stop) under a progress bar. Ctrl-C and SIGTERM end the program between two steps, saved."""
        self.bar = tqdm(range(start, stop), initial=start, total=stop, desc=self.name, disable=None)
        for step in self.bar:
            yield step
            if self.signals:
                self.save(step + 1)
                self.bar.close()
                fail(f"interrupted, saved at step {step + 1}; the same command continues it", 128 + self.signals[0])

    def log(self, step, **metrics):
        """Adds an evaluation to metrics.jsonl and shows it. A loss that is not finite ends the program (exit 1)."""
        if not math.isfinite(metrics["loss"]):
            fail(f"{self.name}: the loss is {metrics['loss']} at step {step}, learning rate {self.args.lr}; the last "
                 f"checkpoint stays. Try a smaller --lr{' or --dtype float32' if self.args.dtype != 'float32' else ''}")
        self.metrics.append({"step": step, "seconds": round(time.perf_counter() - self.started, 2), **metrics})
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.metrics).encode())
        shown = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)]
        if self.bar and not self.bar.disable:
            return self.bar.set_postfix_str(", ".join(shown[:2]))                # the loss and the paper's main metric
        print(f"{self.name} step {step}: {', '.join(shown)}", flush=True)

def sweep(args, presets, over):
    """The product of the lists in args that `over` names, as Runs; what differs from the preset names the folder.
    A setting may be a dict: the run takes what it has for the run's first flag of `over` (its model, its task)."""
    runs, script = {}, Path(sys.argv[0]).stem
    for values in itertools.product(*(getattr(args, key) for key in over)):
        picked = dict(zip(over, values))
        own = [f"{key}={'+'.join(value) if isinstance(value, list) else value}".replace(":", "-")
               for key, value in picked.items() if [value] != presets[args.preset].get(key, [[]])]
        name = ",".join([args.preset, *own])
        settings = {k: v[values[0]] if isinstance(v, dict) else v for k, v in {**vars(args), **picked}.items()}
        runs[name] = Run(argparse.Namespace(**settings), Path(args.out_dir) / script / name)
    return list(runs.values())

def complete(runs, train):
    """Trains the runs that are not finished, under torchrun this process's share; rank 0 returns all their results."""
    catch = lambda number, frame: signal.default_int_handler() if Run.signals else Run.signals.append(number)
    signal.signal(signal.SIGINT, catch), signal.signal(signal.SIGTERM, catch)    # Run.steps looks between two steps
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if world > 1:
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
            torch.distributed.barrier()                                          # all have removed what they overwrite
        for run in [run for run in runs[rank::world] if not run.read("results.json")]:
            run.write("config.json", json.dumps(run.config, indent=1).encode())
            seed_everything(run.args.seed)
            run.write("results.json", json.dumps(train(run.args, run)).encode())
        if world > 1:
            torch.distributed.barrier()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues from the last checkpoint", 130)
    except OSError as error:
        fail(f"cannot write to {run.folder}: {error.strerror}")
    return [run.read("results.json") for run in runs] if rank == 0 else sys.exit()
