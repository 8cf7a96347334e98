"""common.py: GPT-2's blocks against NumPy, devices, the command line, tables, and what happens to runs and their folders.

Runs are tried on toy.py, a script of the form that all five have.
"""
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import toy

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def cut_and_continued(script, folder, flags, before, until):
    """Runs a command three times at once: whole, and cut off by Ctrl-C and by SIGKILL after the line `until`, then repeated.

    Asserts that the repetition does not print the evaluation `before`, whose checkpoint was safe by then, and that all three
    leave the same metrics and results. Returns what the whole run printed; its folder is folder / "0".
    """
    exits = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}

    def one(number):
        command = [sys.executable, "-u", str(script), *flags, "--out-dir", str(folder / f"{number}")]
        if number:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
            while until not in process.stdout.readline() and process.poll() is None:
                pass
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
            assert process.returncode == exits[number]
            assert number == signal.SIGKILL or "saved at step" in error and "the same command continues it" in error
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        assert ("continues at step" in done.stdout) == bool(number)
        assert (before in done.stdout) == (not number)                           # it went on, it did not start again
        own, = [path for path in (folder / f"{number}" / script.stem).iterdir() if path.is_dir()]
        return metrics_of(own), results_of(own), done.stdout

    with ThreadPoolExecutor(3) as pool:
        whole, *cut = pool.map(one, (0, int(signal.SIGINT), int(signal.SIGKILL)))
    for other in cut:
        assert other[:2] == whole[:2]
    return whole[2]


def metrics_of(folder):
    """The lines of a run's metrics.jsonl without the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def results_of(folder):
    """A run's results.json without the time."""
    results = json.loads((folder / "results.json").read_text())
    del results["finished"]
    return results


def call_main(module, *flags):
    """The command in this process, which saves the seconds of importing torch; returns what main returns."""
    return module.main([str(flag) for flag in flags])


# ---- The blocks -----------------------------------------------------------------------------------------------------

def numpy_block(block, x):
    """A pre-norm GPT-2 block on x (T, C) in plain NumPy, one head and one query at a time."""
    w = {name: p.detach().double().numpy() for name, p in block.named_parameters()}

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    T, C = x.shape
    size, qkv, y = C // block.attn.n_head, linear(norm(x, "ln_1"), "attn.c_attn"), np.zeros((T, C))
    weights = np.zeros((block.attn.n_head, T, T))
    for h in range(block.attn.n_head):
        q, k, v = (qkv[:, i * C + h * size:i * C + (h + 1) * size] for i in range(3))
        for t in range(T):
            scores = np.array([q[t] @ k[s] / math.sqrt(size) for s in range(t + 1)])
            weights[h, t, :t + 1] = np.exp(scores) / np.exp(scores).sum()
            y[t, h * size:(h + 1) * size] = weights[h, t] @ v
    x = x + linear(y, "attn.c_proj")
    u = linear(norm(x, "ln_2"), "mlp.c_fc")
    u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return x + linear(u, "mlp.c_proj"), weights


def test_block_agrees_with_numpy_and_counts_its_parameters():
    torch.manual_seed(0)
    block = common.Block(n_embd=12, n_head=3).double()
    for p in block.parameters():
        p.data.normal_(std=0.5)
    x = torch.randn(2, 7, 12, dtype=torch.double)
    y, attn = block(x, return_attn=True)
    for b in range(2):
        expected, weights = numpy_block(block, x[b].numpy())
        np.testing.assert_allclose(y[b].detach(), expected, atol=1e-12)
        np.testing.assert_allclose(attn[b].detach(), weights, atol=1e-12)
    torch.testing.assert_close(block(x), y)
    assert sum(p.numel() for p in block.parameters()) == 12 * 12**2 + 13 * 12
    assert {name.rsplit(".", 1)[0] for name, _ in block.named_parameters()} == {
        "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}


def test_attention_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="10 is not divisible by n_head 4"):
        common.CausalSelfAttention(10, 4)


def test_dropout_is_active_in_training_alone():
    block, x = common.Block(16, 2, dropout=0.5), torch.randn(1, 8, 16)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_gpt2_initialisation():
    common.seed_everything(0)
    block = common.Block(256, 4)
    common.gpt2_init_(block, n_layer=8)
    for name, p in block.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p))
        else:
            expected = 0.02 / 4 if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02) and abs(p.mean().item()) < expected / 50


def test_pick_device():
    assert common.pick_device("cpu") == torch.device("cpu")
    assert common.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:x", "cuda:", "cuda:99", "cpu:1"):
        with pytest.raises(ValueError, match=name):
            common.pick_device(name)


def test_a_cpu_keeps_freed_memory_where_glibc_can(monkeypatch):
    calls = []

    class Glibc:
        def mallopt(self, parameter, value):
            calls.append(parameter)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: Glibc())
    assert common.pick_device("cpu") == torch.device("cpu") and calls == [-1, -2, -3]
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())                    # another C library
    assert common.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert common.pick_device("cpu") == torch.device("cpu") and len(calls) == 3


def test_auto_takes_the_first_device_that_the_script_can_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.pick_device("auto").type == "mps"
    assert common.pick_device("auto", kinds=("cuda", "cpu")).type == "cpu"
    with pytest.raises(ValueError, match="mps"):
        common.pick_device("mps", kinds=("cuda", "cpu"))


# ---- Tables ---------------------------------------------------------------------------------------------------------

def test_spread():
    assert common.spread([0.5]) == "0.500"
    assert common.spread([3, 1, 2], ".0f") == "2 [1, 3]"
    assert common.spread([None, 100, 200], ".0f") == "200 [100, -]"
    assert common.spread([None]) == "-"
    assert common.spread([2, 3], ".0f") == "2.5 [2, 3]"                           # not the 2 that rounding to even gives


def test_a_table_is_aligned(capsys):
    common.print_table(["a", "long"], [["100", "2"]])
    assert capsys.readouterr().out == "  a  long\n100     2\n"


def test_a_table_of_one_wide_column_has_no_part_of_keys_alone(capsys):
    common.print_table(["setting", "number"], [["s" * 98, "0.5"], ["t", "0.7"]])
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["number", "0.5", "0.7"]


def test_a_wide_table_is_split_and_repeats_what_names_the_rows(capsys):
    header = ["model", "task", *(f"column {i:02}" for i in range(20))]
    rows = [["big", "one", *(f"{i}.000" for i in range(20))], ["small", "two", *(f"{i}.500" for i in range(20))]]
    common.print_table(header, rows, keys=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 3 and max(map(len, lines)) <= 100
    for line, start in zip(lines, ["model  task", "  big   one", "small   two"] * 3):
        assert line.startswith(start)
    words = " ".join(lines).split()
    assert [word for word in words if word.endswith(".500")] == [f"{i}.500" for i in range(20)]


# ---- The command line -----------------------------------------------------------------------------------------------

def test_help_has_the_docstring_and_the_values_of_the_preset(capsys):
    for flags in (["--preset", "paper", "--help"], ["--help", "--preset=paper"]):
        with pytest.raises(SystemExit) as stop:
            toy.main(flags)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "    python toy.py" in out
        assert "(default: linear mlp)" in out and "(default: 50)" in out


def test_help_shows_a_default_of_zero(capsys, monkeypatch):
    monkeypatch.setitem(toy.PRESETS, "quick", {**toy.PRESETS["quick"], "n_eval": 0})
    with pytest.raises(SystemExit):
        toy.parse_args(["--help"])
    assert "points to measure at (default: 0)" in " ".join(capsys.readouterr().out.split())


def test_an_explicit_flag_beats_the_preset():
    args = toy.parse_args(["--preset", "paper", "--steps", "7", "--width=3"])
    assert (args.steps, args.width, args.model) == (7, [3], ["linear", "mlp"])
    assert sorted(args.given) == ["preset", "steps", "width"] and args.usual["steps"] == 50


# ---- Folders --------------------------------------------------------------------------------------------------------

def names(*flags):
    args = toy.parse_args([str(flag) for flag in flags])
    return [run.name for run in common.sweep(args, toy.SWEEP, toy.resolve, measured=["n_eval"])]


def test_a_folder_is_named_for_what_differs_from_the_preset():
    assert names() == ["quick,seed=0"]
    assert names("--steps", 20, "--lr", 0.1, "--model", "linear", "--seed", 0) == ["quick,seed=0"]         # nothing differs
    assert names("--steps", 30, "--seed", 0, 1) == ["quick,steps=30,seed=0", "quick,steps=30,seed=1"]
    assert names("--lr", 0.5, "--preset", "paper") == ["paper,model=linear,lr=0.5,seed=0", "paper,model=mlp,lr=0.5,seed=0"]
    assert names("--n-eval", 3, "--eval-every", 2, "--overwrite", "--device", "cpu") == ["quick,seed=0"]


def test_equal_trainings_are_one_run():
    assert names("--width", 4, 5, "--model", "linear", "mlp") == ["quick,seed=0", "quick,model=mlp,seed=0",
                                                                  "quick,model=mlp,width=5,seed=0"]
    assert names("--seed", 1, 1, 1) == ["quick,seed=1"]


def test_a_long_name_ends_in_a_hash_of_its_own(tmp_path):
    found = set()
    for i in range(3):
        text = tmp_path / f"{'long ' * 30}{i}.txt"
        text.write_text("text")
        name, = names("--text", text)
        assert len(name) <= 200 and name.endswith(",seed=0") and "/" not in name and " " not in name
        found.add(name)
    assert len(found) == 3


def test_a_sweep_is_named_as_a_whole(tmp_path):
    args = toy.parse_args(["--model", "linear", "mlp", "--steps", "30"])
    assert common.sweep(args, toy.SWEEP, toy.resolve)[0].sweep == "quick,model=linear+mlp,steps=30"


# ---- What happens to a run ------------------------------------------------------------------------------------------

def test_a_run_says_what_happens_to_it(tmp_path, capsys):
    toy.main(["--out-dir", str(tmp_path), "--seed", "0", "1"])
    out = capsys.readouterr().out
    assert "1/2 quick,seed=0: new\n1/2 step 5: loss" in out and "2/2 quick,seed=1: new\n" in out and "2/2 measuring\n" in out
    toy.main(["--out-dir", str(tmp_path), "--seed", "1", "2"])
    out = capsys.readouterr().out
    assert "1/2 quick,seed=1: finished on 20" in out and ", read\n" in out and "2/2 quick,seed=2: new" in out
    assert max(map(len, out.splitlines())) <= 100


def test_main_returns_the_results_and_load_the_model_twice_in_one_session(tmp_path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        result, = toy.main(["--out-dir", str(tmp_path)])
        _, model = toy.load(result["folder"])
        assert not model.training and model(torch.ones(1, 1)).item() == pytest.approx(2, abs=0.5)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no trained run"):
        toy.load(tmp_path / "nowhere")


def test_what_is_only_measured_is_measured_on_the_checkpoint(tmp_path, capsys):
    result, = toy.main(["--out-dir", str(tmp_path)])
    before = (tmp_path / "toy" / "quick,seed=0" / "ckpt.pt").stat().st_mtime_ns
    again, = toy.main(["--out-dir", str(tmp_path), "--n-eval", "9", "--eval-every", "3"])
    assert "measured again for n_eval" in capsys.readouterr().out
    assert again["n_eval"] == 9 and again["error"] != result["error"]
    assert (tmp_path / "toy" / "quick,seed=0" / "ckpt.pt").stat().st_mtime_ns == before


def test_a_finished_run_is_drawn_beside_its_folder(tmp_path):
    pytest.importorskip("matplotlib")
    toy.main(["--out-dir", str(tmp_path)])
    toy.main(["--out-dir", str(tmp_path), "--plot"])
    assert (tmp_path / "toy" / "curve,quick.png").exists()


def test_overwrite_trains_anew_and_removes_nothing_before_it_can_start(tmp_path, monkeypatch, capsys):
    flags = ["--out-dir", str(tmp_path), "--overwrite"]
    toy.main(flags)
    folder = tmp_path / "toy" / "quick,seed=0"
    (folder / "ckpt.pt").write_bytes(b"old")
    build = toy.build
    monkeypatch.setattr(toy, "build", lambda args: (_ for _ in ()).throw(MemoryError("too large")))
    with pytest.raises(SystemExit) as stop:
        toy.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "MemoryError: too large" in error
    assert (folder / "ckpt.pt").read_bytes() == b"old" and (folder / "results.json").exists()
    monkeypatch.setattr(toy, "build", build)
    toy.main(flags)
    assert "quick,seed=0: new" in capsys.readouterr().out and (folder / "ckpt.pt").read_bytes() != b"old"


def test_a_run_that_fails_lets_the_sweep_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        toy.main(["--out-dir", str(tmp_path), "--model", "mlp", "linear", "--lr", "500", "--steps", "14", "--eval-every", "13"])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "1 of 2 runs did not finish" in captured.err
    assert "1/2 quick,model=mlp" in captured.err and "--lr 500" in captured.err and "linear" in captured.out.splitlines()[-1]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    toy.main(["--out-dir", str(tmp_path), "--steps", "10"])
    build = toy.build

    def broken(args):
        task, model = build(args)
        model.register_buffer("extra", torch.tensor(math.nan))
        return task, model
    monkeypatch.setattr(toy, "build", broken)
    with pytest.raises(SystemExit):
        toy.main(["--out-dir", str(tmp_path)])
    assert "is nan at step 5 (unsaved); try less than --lr 0.1" in capsys.readouterr().err
    assert not (tmp_path / "toy" / "quick,seed=0" / "ckpt.pt").exists()


def test_a_checkpoint_brings_back_model_optimizer_generators_and_metrics(tmp_path):
    def start():
        args = toy.parse_args(["--out-dir", str(tmp_path)])
        run, = common.sweep(args, toy.SWEEP, toy.resolve)
        run.folder.mkdir(parents=True, exist_ok=True)
        common.seed_everything(0)
        model = torch.nn.Linear(3, 3)
        objects = dict(model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True),
                       data=torch.Generator().manual_seed(5))
        return run, run.restore(**objects), *objects.values()

    def work(model, optimizer, data, steps):
        for _ in range(steps):
            x = torch.randn(4, 3, generator=data)
            torch.nn.functional.dropout(model(x), 0.5).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    _, step, model, optimizer, data = start()
    assert step == 0
    work(model, optimizer, data, 10)
    expected = model.weight.clone(), torch.rand(1, generator=data), torch.rand(1)

    run, _, model, optimizer, data = start()
    for step in run.steps(0, 5):
        work(model, optimizer, data, 1)
        run.log(step + 1, loss=1.0)
        if step == 3:
            run.save(4)                                                          # the fifth step is lost

    run, step, model, optimizer, data = start()
    assert step == 4 and [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    work(model, optimizer, data, 6)
    for a, b in zip((model.weight, torch.rand(1, generator=data), torch.rand(1)), expected):
        assert torch.equal(a, b)


DAMAGES = {
    "results.json": "is damaged",
    "ckpt.pt": "does not fit",
    "metrics.jsonl": "is damaged",
    "config.json": "is damaged",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named(name, tmp_path, capsys):
    toy.main(["--out-dir", str(tmp_path)])
    folder = tmp_path / "toy" / "quick,seed=0"
    if name != "results.json":
        (folder / "results.json").unlink()
    (folder / name).write_text("{")
    with pytest.raises(SystemExit) as stop:
        toy.main(["--out-dir", str(tmp_path)])
    first = capsys.readouterr().err.splitlines()[0]
    assert stop.value.code == 1 and name in first and DAMAGES[name] in first and "--overwrite" in first
    toy.main(["--out-dir", str(tmp_path), "--overwrite"])


def test_a_checkpoint_of_another_shape_is_one_line(tmp_path, monkeypatch, capsys):
    toy.main(["--out-dir", str(tmp_path)])
    (tmp_path / "toy" / "quick,seed=0" / "results.json").unlink()
    monkeypatch.setattr(toy, "build", lambda args: (None, torch.nn.Linear(2, 1)))
    with pytest.raises(SystemExit):
        toy.main(["--out-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert "ckpt.pt does not fit" in error and error.count("\n") == 2


def test_a_folder_without_a_config_is_told(tmp_path, capsys):
    toy.main(["--out-dir", str(tmp_path)])
    (tmp_path / "toy" / "quick,seed=0" / "config.json").unlink()
    toy.main(["--out-dir", str(tmp_path)])
    assert "changed since: settings, code, data" in capsys.readouterr().out


def run_with(folder, **changes):
    """The toy's default run in that folder, its config.json changed; the run's own folder."""
    toy.main(["--out-dir", str(folder)])
    run = folder / "toy" / "quick,seed=0"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **changes}))
    return run


def test_a_run_begun_by_other_code_says_so_to_its_end(tmp_path, capsys):
    folder = run_with(tmp_path, code="another")
    for told in "changed since: code; --overwrite", "changed on the way: code":
        (folder / "results.json").unlink()
        capsys.readouterr()
        toy.main(["--out-dir", str(tmp_path)])
        assert told in capsys.readouterr().out.splitlines()[0]
    toy.main(["--out-dir", str(tmp_path)])
    assert "read; changed on the way: code" in capsys.readouterr().out


def test_a_run_begun_on_another_device_is_not_called_damaged(tmp_path, capsys):
    folder = run_with(tmp_path, device="cuda")
    (folder / "results.json").unlink()
    with pytest.raises(SystemExit):
        toy.main(["--out-dir", str(tmp_path), "--device", "cpu"])
    assert "begun on cuda: give --device cuda" in capsys.readouterr().err


def test_another_pace_of_evaluation_than_a_finished_runs_is_told(tmp_path, capsys):
    toy.main(["--out-dir", str(tmp_path), "--eval-every", "10"])
    toy.main(["--out-dir", str(tmp_path), "--eval-every", "5"])
    assert "read; changed since: eval_every; --overwrite" in capsys.readouterr().out


def test_load_tells_of_data_that_has_changed(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one")
    result, = toy.main(["--out-dir", str(tmp_path / "out"), "--text", str(text)])
    toy.load(result["folder"])
    assert capsys.readouterr().err == ""
    text.write_text("two")
    toy.load(result["folder"])
    assert "text.txt has changed since training" in capsys.readouterr().err


def test_changed_data_is_told(tmp_path, capsys):
    text = tmp_path / "text.txt"
    for content, told in ("one", False), ("two", True):
        text.write_text(content)
        toy.main(["--out-dir", str(tmp_path / "out"), "--text", str(text)])
        assert ("changed since: data; --overwrite" in capsys.readouterr().out) == told


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        toy.main(["--out-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "No space left on device" in error and "config.json" in error and error.count("\n") == 2
    assert not list(tmp_path.rglob("*.tmp"))                                     # nothing that fills it further


def test_an_interruption_on_a_full_disk_ends_the_sweep(tmp_path, monkeypatch):
    args = toy.parse_args(["--out-dir", str(tmp_path)])
    run, = common.sweep(args, toy.SWEEP, toy.resolve)

    def full(step):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(run, "save", full)
    monkeypatch.setattr(common.Run, "caught", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stop:
        next(steps := run.steps(0, 5)), next(steps)
    assert "not saved" in stop.value.args[0] and "No space" in stop.value.args[0] and stop.value.args[1] == 130


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def none(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", none)
    toy.main(["--out-dir", str(tmp_path)])
    assert "no locks here" in capsys.readouterr().out


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "toy" / "quick,seed=0"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 123", file=lock, flush=True)
        with pytest.raises(SystemExit) as stop:
            toy.main(["--out-dir", str(tmp_path), "--seed", "0", "1"])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "process 123 is at work on it" in captured.err
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert (tmp_path / "toy" / "quick,seed=1" / "results.json").exists()
    assert (tmp_path / "toy" / "quick,seed=1" / ".lock").read_text() == f"process {os.getpid()}\n"


def test_a_run_lets_go_of_its_folder_and_its_model_when_it_ends(tmp_path, monkeypatch):
    """Also after Ctrl-C, whose traceback an interactive session keeps, and the frames with it."""
    def interrupted(args, run):
        raise KeyboardInterrupt("stopped", 130)

    args = toy.parse_args(["--out-dir", str(tmp_path)])
    run, = common.sweep(args, toy.SWEEP, toy.resolve, measured=["n_eval"])
    with pytest.raises(KeyboardInterrupt) as kept:
        common.complete([run], toy.train, interrupted, toy.show)
    assert run.objects is None
    assert toy.main(["--out-dir", str(tmp_path)])                               # no process is at work there
    assert kept.value.args == ("stopped", 130)


def test_a_run_killed_before_its_first_checkpoint_logs_nothing_twice(tmp_path):
    toy.main(["--out-dir", str(tmp_path)])
    folder = tmp_path / "toy" / "quick,seed=0"
    whole = metrics_of(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0].replace('"step": 5', '"step": 0'))
    (folder / "ckpt.pt").unlink()
    (folder / "results.json").unlink()
    toy.main(["--out-dir", str(tmp_path)])
    assert metrics_of(folder) == whole


# ---- As commands ----------------------------------------------------------------------------------------------------

def copied(tmp_path, name="toy.py"):
    """The toy script and common.py in a folder of their own, which a test may change."""
    shutil.copy(HERE.parent / "common.py", tmp_path)
    shutil.copy(HERE / "toy.py", tmp_path / name)
    return tmp_path / name


def run_command(*words, cwd, **settings):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, **settings)


def test_changed_code_is_told_and_another_name_and_standard_input_work(tmp_path):
    script = copied(tmp_path, "mine.py")
    assert run_command("mine.py", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "mine" / "quick,seed=0" / "results.json").exists()
    run = tmp_path / "out" / "mine" / "quick,seed=0"
    trained = (run / "ckpt.pt").stat().st_mtime_ns
    # a number that measure() has learnt to tell is there for the old run, too, which is not trained again
    script.write_text(script.read_text().replace("dict(error=", "dict(answer=42, error="))
    changed = run_command("mine.py", cwd=tmp_path).stdout
    assert "measured again for the changed code; changed since: code; --overwrite" in changed
    assert '"answer": 42' in (run / "results.json").read_text() and (run / "ckpt.pt").stat().st_mtime_ns == trained
    assert "read; changed since: code; --overwrite" in run_command("mine.py", cwd=tmp_path).stdout
    # a setting that the old run does not have: its model cannot be built by the new code, its results are read
    text = script.read_text().replace("nn.Linear(1, 1)", "nn.Linear(1, 1, bias=args.bias > 0)").replace("width=", "bias=1, width=", 1)
    script.write_text(text.replace('    add("--depth"', '    add("--bias", type=int, help="new")\n    add("--depth"'))
    done = run_command("mine.py", cwd=tmp_path)
    assert done.returncode == 0 and "read; changed since: settings, code; --overwrite" in done.stdout, done.stderr
    assert run_command("-", cwd=tmp_path, input=script.read_text()).returncode == 0
    assert (tmp_path / "out" / "stdin" / "quick,seed=0" / "results.json").exists()


def test_a_closed_output_is_one_line(tmp_path):
    copied(tmp_path)
    command = [sys.executable, "-u", "toy.py", "--steps", "20000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 1 and error.count("\n") == 1 and "output was closed" in error


@pytest.mark.parametrize("numbers, code, word", [
    ([signal.SIGINT], 130, "saved at step"), ([signal.SIGTERM], 143, "saved at step"), ([signal.SIGINT, signal.SIGINT], 130, "interrupted")])
def test_an_interruption_is_one_line(numbers, code, word, tmp_path):
    copied(tmp_path)
    command = [sys.executable, "-u", "toy.py", "--steps", "1000000", "--eval-every", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while " step 1,000:" not in process.stdout.readline():
        pass
    for number in numbers:
        process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code and error.count("\n") == 1 and word in error


def test_an_interruption_outside_of_training_is_at_once(tmp_path):
    script = copied(tmp_path)
    slow = "def measure(args, run):\n    import time; time.sleep(100)"
    script.write_text(script.read_text().replace("def measure(args, run):", slow))
    command = [sys.executable, "-u", "toy.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "measuring" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and error.count("\n") == 1 and "the same command goes on" in error


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    script = copied(tmp_path)
    flags = ["--model", "mlp", "--steps", "4000", "--eval-every", "100"]
    cut_and_continued(script, tmp_path / "out", flags, before="1/1 step 100:", until="step 1,000")


def test_torchrun_deals_out_the_runs(tmp_path):
    copied(tmp_path)

    def torchrun(n):
        flags = ["--nproc-per-node", n, "--master-port", "29613", "toy.py", "--seed", "0", "1", "2", "--overwrite"]
        return run_command("-m", "torch.distributed.run", *flags, cwd=tmp_path)

    # of eight processes one nearly always aborts at its exit where the process group is left open
    done = torchrun(8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": new") == 3 and done.stdout.count("model") == 1
    assert len(list((tmp_path / "out" / "toy").glob("*/results.json"))) == 3
    # a run that fails in the other process is not shown by its old results
    script = tmp_path / "toy.py"
    bad = 'def train(args, run):\n    if args.seed == 1:\n        raise ValueError("seed 1")'
    script.write_text(script.read_text().replace("def train(args, run):", bad))
    done = torchrun(2)
    assert done.returncode == 1 and "1 of 3 runs did not finish" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_in_a_cuda_graph_trains_as_the_eager_one():
    def losses(graphed):
        common.seed_everything(0)
        model = torch.nn.Linear(8, 8).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), fused=True, capturable=True)
        data = torch.Generator("cuda").manual_seed(0)

        def step():
            loss = model(torch.randn(16, 8, generator=data, device="cuda")).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()
        step = common.compile_step(step, model, data) if graphed else step
        return [step().item() for _ in range(10)]
    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
