"""common.py: GPT-2's blocks against NumPy, devices, the command line, tables, figures, and what happens to runs and their folders.

Runs are tried on toy.py, a script of the form that all five have.
"""
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import pick_device
import toy

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}


def toy_command(*flags, **settings):
    """The toy script as a command, finished."""
    command = [sys.executable, str(HERE / "toy.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=ENVIRONMENT, **settings)


def files_of(folder):
    """The metrics and the results of each run below a folder, by the run's name."""
    found = {}
    for path in Path(folder).glob("**/results.json"):
        found[path.parent.name] = path.read_text(), (path.parent / "metrics.jsonl").read_text()
    return found


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def refused(main, folder, *flags):
    """The one line with which a script refuses flags before it writes anything."""
    with pytest.raises(common.UsageError) as error:
        main([*flags, "--out-dir", folder / "out"])
    line = str(error.value)
    assert "\n" not in line and len(line) < 400 and not (folder / "out").exists()
    return line


# ---- The blocks -----------------------------------------------------------------------------------------------------

def numpy_norm(x, layer):
    """A layer norm of x (T, C) in plain NumPy."""
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def numpy_linear(x, layer):
    """A linear map of x (T, C) in plain NumPy."""
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def numpy_mlp(x, mlp):
    """An MLP of x (T, C) in plain NumPy, with GPT-2's GELU."""
    u = numpy_linear(x, mlp.c_fc)
    return numpy_linear(0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))), mlp.c_proj)


def numpy_block(block, x):
    """A pre-norm GPT-2 block on x (T, C) in plain NumPy, one head and one query at a time."""
    T, C = x.shape
    size, qkv, y = C // block.attn.n_head, numpy_linear(numpy_norm(x, block.ln_1), block.attn.c_attn), np.zeros((T, C))
    weights = np.zeros((block.attn.n_head, T, T))
    for h in range(block.attn.n_head):
        q, k, v = (qkv[:, i * C + h * size:i * C + (h + 1) * size] for i in range(3))
        for t in range(T):
            scores = np.array([q[t] @ k[s] / math.sqrt(size) for s in range(t + 1)])
            weights[h, t, :t + 1] = np.exp(scores) / np.exp(scores).sum()
            y[t, h * size:(h + 1) * size] = weights[h, t] @ v
    x = x + numpy_linear(y, block.attn.c_proj)
    return x + numpy_mlp(numpy_norm(x, block.ln_2), block.mlp), weights


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
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "cuda:x", "cuda:", "cuda:99", "cpu:1", "mps"):
        with pytest.raises(ValueError, match=name):
            pick_device(name)


def test_under_torchrun_cuda_is_the_processs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    precision = []                                           # not set in earnest: other tests would run with it
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precision.append)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert pick_device("auto") == torch.device("cuda", 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert precision == ["high", "high"]                     # TF32


# ---- Tables and figures ---------------------------------------------------------------------------------------------

def test_spread():
    assert common.spread([0.5]) == "0.500"
    assert common.spread([0.1, 0.9, 0.3], ".1f") == "0.3 [0.1, 0.9]"
    assert common.spread([5, None, 7], ".0f") == "7 [5, -]" and common.spread([None]) == "-"


def test_a_table_is_aligned_and_seeds_are_one_cell(capsys):
    common.print_table("title", [("a", "x", 0.1), ("a", "x", 0.3), ("bb", "y", "text"), ("a", "y", 7, ".0f")])
    assert capsys.readouterr().out.splitlines() == [
        "", "title",
        "                       x     y",
        " a  0.200 [0.100, 0.300]     7",
        "bb                        text"]


def test_curves_of_one_label_are_a_median_in_a_band(tmp_path, figures):
    curves = [("model", [1, 10], [y, 2 * y], dict(marker="o")) for y in (0.1, 0.2, 0.6)] + [("paper", [1, 10], [0, 1], {})]
    curves.append(("model", [1, 5, 10], [0, 0, 0], {}))                          # a seed evaluated at other steps
    common.plot(tmp_path / "curves.png", {"first": (dict(xscale="log", xlabel="steps"), curves), "second": ({}, curves[:1])})
    first, second = figures["curves"].axes
    drawn = [(line.get_label(), list(line.get_ydata())) for line in first.lines]
    assert drawn == [("model", [0.2, 0.4]), ("paper", [0, 1]), ("model", [0, 0, 0])]
    band = first.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 6)) for x, y in band} >= {(1, 0.1), (1, 0.6), (10, 0.2), (10, 1.2)}
    assert first.get_xscale() == "log" and first.get_title() == "first" and second.get_title() == "second"


def test_matrices_are_drawn_with_their_circles(tmp_path, figures):
    common.plot_matrices(tmp_path / "m.png", {"m": (np.eye(2), ["a", "b"], ["c", "d"], dict(xlabel="key"), [(0, 1)])})
    axis, = figures["m"].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"] and axis.get_xlabel() == "key"
    assert axis.images[0].get_array().tolist() == [[1, 0], [0, 1]] and axis.lines[0].get_xydata().tolist() == [[1, 0]]


# ---- The command line and the folders of a sweep --------------------------------------------------------------------

def names(*flags):
    """The folders of a sweep of the toy."""
    args = toy.parse_args([str(flag) for flag in flags])
    return [run.folder.name for run in common.sweep(args, toy.SWEEP, toy.build, toy.resolve, measured=["n_eval"])]


def test_help_has_the_docstring_and_the_values_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        toy.parse_args(["--preset", "paper", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "learns y = 2x" in out and "(default: linear mlp)" in out and "(default: 50)" in out and "None" not in out


def test_an_explicit_flag_beats_the_preset():
    args = toy.parse_args(["--preset", "paper", "--steps", "7"])
    assert args.steps == 7 and args.width == [8]


def test_a_folder_is_named_for_what_differs_from_the_preset():
    assert names() == ["quick,seed=0"]
    assert names("--model", "linear", "--seed", 0, 1) == ["quick,seed=0", "quick,seed=1"]
    assert names("--lr", 0.5, "--preset", "paper") == ["paper,model=linear,lr=0.5,seed=0", "paper,model=mlp,lr=0.5,seed=0"]
    assert names("--n-eval", 3, "--eval-every", 2, "--device", "cpu", "--steps", 20) == ["quick,seed=0"]


def test_equal_trainings_are_one_run():
    assert names("--width", 4, 6, "--model", "linear", "mlp") == ["quick,seed=0", "quick,model=mlp,seed=0",
                                                                  "quick,model=mlp,width=6,seed=0"]
    assert names("--seed", 1, 1, 1) == ["quick,seed=1"]


def test_names_are_short_and_plain():
    name, = names("--text", "a/b \u6587.txt")
    assert name == "quick,text=a_b__.txt,seed=0"
    first, second = [names("--text", 300 * "x" + end)[0] for end in "ab"]
    assert first != second and max(len(first), len(second)) < 180


@pytest.mark.parametrize("flags, line", [
    (["--steps", "x"], "invalid int value"),
    (["--steps", "0"], "0 is not from 1"),
    (["--lr", "nan"], "nan is not from"),
    (["--steps", "3", "4"], "not understood: 4 (several values: --model --width --seed)"),
    (["--preset", "huge"], "invalid choice"),
    (["--device", "cuda:99"], "--device cuda:99 is not available"),
    (["--depth", "3"], "--depth has no effect"),
    (["--model", "mlp", "--width", "3"], "width 3 is odd"),
])
def test_what_cannot_be_is_one_line_before_anything_is_written(flags, line, tmp_path):
    assert line in refused(toy.main, tmp_path, *flags)


def test_a_command_turns_it_into_a_line_and_an_exit_status(tmp_path):
    done = toy_command("--steps", "x", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_plot_without_matplotlib_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(toy.main, tmp_path, "--plot")


# ---- What happens to runs -------------------------------------------------------------------------------------------

def started(tmp_path):
    """A run of the toy before its first step, and its model."""
    args = toy.parse_args(["--out-dir", str(tmp_path)])
    run, = common.sweep(args, toy.SWEEP, toy.build, toy.resolve)
    _, model = toy.build(run.args)
    assert run.restore(model, torch.optim.SGD(model.parameters()), torch.Generator()) == 0
    return run, model


def test_main_returns_the_results_and_load_the_model_twice_in_one_session(tmp_path):
    for _ in range(2):
        results = toy.main(["--out-dir", str(tmp_path), "--seed", "0", "1"])
        assert [result["settings"]["seed"] for result in results] == [0, 1]
        task, model = toy.load(results[0]["folder"])
        x = torch.linspace(-1, 1, 64)[:, None]
        assert task is None and not model.training
        assert torch.nn.functional.mse_loss(model(x), 2 * x).item() == results[0]["error"]


def test_load_names_a_folder_without_a_run_and_another_scripts(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no trained run"):
        toy.load(tmp_path / "nowhere")
    result, = toy.main(["--out-dir", str(tmp_path)])
    with pytest.raises(ValueError, match="is a run of toy.py"):
        common.load(result["folder"], names)


def test_what_is_only_measured_is_measured_on_the_checkpoint(tmp_path):
    result, = toy.main(["--out-dir", str(tmp_path)])
    before = (Path(result["folder"]) / "ckpt.pt").stat().st_mtime_ns
    again, = toy.main(["--out-dir", str(tmp_path), "--n-eval", "9", "--eval-every", "3"])
    assert again["n_eval"] == 9 and again["error"] != result["error"]
    assert (Path(result["folder"]) / "ckpt.pt").stat().st_mtime_ns == before


def test_a_finished_run_is_drawn_beside_its_folder(tmp_path):
    pytest.importorskip("matplotlib")
    toy.main(["--out-dir", str(tmp_path)])
    toy.main(["--out-dir", str(tmp_path), "--plot"])
    assert (tmp_path / "toy" / "curve.png").exists()


def test_a_run_that_fails_lets_the_sweep_go_on(tmp_path):
    done = toy_command("--model", "linear", "mlp", "--lr", 1000, "--steps", 300, "--out-dir", tmp_path)
    assert done.returncode == 1 and done.stdout.count("try less than --lr 1000.0") == 2
    good, = toy.main(["--out-dir", str(tmp_path)])
    (tmp_path / "toy" / "quick,seed=1").mkdir()
    (tmp_path / "toy" / "quick,seed=1" / "ckpt.pt").write_text("damaged")
    results = toy.main(["--out-dir", str(tmp_path), "--seed", "0", "1", "2"])
    assert results[0] == good and "error" in results[2] and "ckpt.pt is damaged" in results[1]["failed"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run, model = started(tmp_path)
    run.save(1)
    model.weight.data[0] = math.nan
    with pytest.raises(common.RunError, match="weights is nan at step 2: try less than --lr 0.1"):
        run.save(2)
    assert common.read_checkpoint(run.folder / "ckpt.pt")["step"] == 1


def test_a_checkpoint_brings_back_model_optimizer_generators_and_metrics(tmp_path):
    def start():
        args = toy.parse_args(["--out-dir", str(tmp_path)])
        run, = common.sweep(args, toy.SWEEP, toy.build, toy.resolve)
        common.seed_everything(0)
        model = torch.nn.Linear(3, 3)
        objects = model, torch.optim.AdamW(model.parameters(), fused=True), torch.Generator().manual_seed(5)
        return run, run.restore(*objects), *objects

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
        if step < 4:                                                             # the fifth step is lost
            run.log(step + 1, loss=1.0)

    run, step, model, optimizer, data = start()
    assert step == 4 and [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    work(model, optimizer, data, 6)
    for a, b in zip((model.weight, torch.rand(1, generator=data), torch.rand(1)), expected):
        assert torch.equal(a, b)


def changed_checkpoint(folder, **changes):
    """Replaces entries of a run's checkpoint, which makes it newer than its results, and removes those."""
    ckpt = common.read_checkpoint(folder / "ckpt.pt")
    torch.save({**ckpt, **changes}, folder / "ckpt.pt")
    (folder / "results.json").unlink(missing_ok=True)


def test_a_run_of_another_kind_of_device_is_measured_but_not_resumed(tmp_path):
    first, = toy.main(["--out-dir", str(tmp_path)])
    of_a_gpu = dict(data=torch.zeros(16, dtype=torch.uint8), dropout=torch.zeros(16, dtype=torch.uint8))
    changed_checkpoint(Path(first["folder"]), **of_a_gpu)
    again, = toy.main(["--out-dir", str(tmp_path)])
    assert again == first
    changed_checkpoint(Path(first["folder"]), step=15)
    again, = toy.main(["--out-dir", str(tmp_path)])
    assert "kind of device" in again["failed"]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    first, = toy.main(["--out-dir", str(tmp_path)])
    changed_checkpoint(Path(first["folder"]), model=torch.nn.Linear(2, 1).state_dict())
    again, = toy.main(["--out-dir", str(tmp_path)])
    assert "delete it" in again["failed"] and "\n" not in again["failed"]


def test_between_evaluations_a_checkpoint_is_written_once_a_minute(tmp_path, monkeypatch):
    run, _ = started(tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    saved = []
    monkeypatch.setattr(run, "save", lambda step: (saved.append(step), setattr(run, "saved_at", now)))
    for step in run.steps(0, 10):
        now += 25
    assert saved == [3, 6, 9]


@pytest.mark.parametrize("name, text", [("results.json", None), ("results.json", ""), ("results.json", '{"err'), ("metrics.jsonl", '{"st')])
def test_what_is_missing_or_cut_off_is_made_again_from_the_checkpoint(name, text, tmp_path):
    result, = toy.main(["--out-dir", str(tmp_path)])
    before = files_of(tmp_path)
    path = Path(result["folder"]) / name
    path.unlink() if text is None else path.write_text(text)
    toy.main(["--out-dir", str(tmp_path)])
    assert files_of(tmp_path)["quick,seed=0"][0] == before["quick,seed=0"][0]


def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path):
    first, = toy.main(["--out-dir", str(tmp_path), "--text", "a/b"])
    second, = toy.main(["--out-dir", str(tmp_path), "--text", "a_b"])
    assert first["folder"] == second["folder"] and "has other settings" in second["failed"]


@pytest.mark.parametrize("error, status", [(common.UsageError, 2), (common.RunError, 2), (OSError, 2), (KeyboardInterrupt, 130)])
def test_a_command_ends_in_one_line_for_what_is_no_bug(error, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    def main():
        raise error("what is wrong")
    with pytest.raises(SystemExit) as stop:
        common.command(main)
    assert stop.value.code == status and capsys.readouterr().err == "error: what is wrong\n"


def test_edited_code_measures_again_and_says_so_under_the_table(tmp_path, capsys):
    toy.main(["--out-dir", str(tmp_path)])
    capsys.readouterr()
    folder = tmp_path / "toy" / "quick,seed=0"
    for name in ("ckpt.pt", "results.json", "metrics.jsonl"):
        os.utime(folder / name, (1, 1))                                          # older than the code
    toy.main(["--out-dir", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: trained before the last edit, measured after; delete it to train anew"
    assert (folder / "results.json").stat().st_mtime > 1


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    undisturbed = toy.main(["--out-dir", str(tmp_path / "whole")])
    real = os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    result, = toy.main(["--out-dir", str(tmp_path)])
    assert "No space left" in result["failed"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert common.read_checkpoint(tmp_path / "toy" / "quick,seed=0" / "ckpt.pt")["step"] == 5
    monkeypatch.setattr(os, "fsync", real)
    result, = toy.main(["--out-dir", str(tmp_path)])
    assert result["error"] == undisturbed[0]["error"]


def test_a_read_only_folder_is_still_shown(tmp_path, monkeypatch, capsys):
    toy.main(["--out-dir", str(tmp_path)])
    capsys.readouterr()

    def refuse(path, data):
        raise PermissionError(path)
    monkeypatch.setattr(common, "write", refuse)
    toy.main(["--out-dir", str(tmp_path)])
    assert "linear" in capsys.readouterr().out


def test_an_interruption_is_one_line_that_names_the_folder_and_the_step(tmp_path, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt
    monkeypatch.setattr(toy, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt, match="quick,seed=0 keeps step 20: repeat the command to resume"):
        toy.main(["--out-dir", str(tmp_path)])


def test_what_the_terminal_cannot_show_is_replaced(tmp_path):
    code = "import common; common.command(lambda: [print('\u043f\u0440')] and [])"
    done = subprocess.run([sys.executable, "-c", code], env={**ENVIRONMENT, "PYTHONIOENCODING": "cp1252"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "??"


def test_two_processes_on_one_folder_both_end_with_whole_files(tmp_path):
    whole = toy_command("--steps", 400, "--out-dir", tmp_path / "whole")
    assert whole.returncode == 0
    command = [sys.executable, str(HERE / "toy.py"), "--steps", "400", "--out-dir", str(tmp_path / "both")]
    processes = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(100) for process in processes] == [0, 0]
    assert files_of(tmp_path / "both") == files_of(tmp_path / "whole")


def test_a_slower_process_on_the_same_folder_does_not_change_the_results(tmp_path, monkeypatch):
    """It puts the checkpoint back to an earlier step before the faster one measures."""
    whole, = toy.main(["--out-dir", str(tmp_path / "whole")])
    measure = toy.measure

    def late(args, run):
        ckpt = torch.load(run.folder / "ckpt.pt", weights_only=True)
        for weight in ckpt["model"].values():
            weight.zero_()
        torch.save(ckpt, run.folder / "ckpt.pt")
        return measure(args, run)

    monkeypatch.setattr(toy, "measure", late)
    both, = toy.main(["--out-dir", str(tmp_path / "both")])
    assert both["error"] == whole["error"]


def test_processes_of_torchrun_deal_out_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in [(0, [0, 2]), (1, [1])]:
        monkeypatch.setenv("RANK", str(rank))
        results = toy.main(["--out-dir", str(tmp_path), "--seed", "0", "1", "2"])
        assert [result["settings"]["seed"] for result in results] == expected
    assert "The error" not in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")
    toy.main(["--out-dir", str(tmp_path), "--seed", "0", "1", "2"])
    assert "The error" in capsys.readouterr().out


@pytest.mark.slow
def test_each_run_of_a_compiled_sweep_is_compiled(tmp_path):
    """Without a reset torch stops compiling after some runs, and their weights differ from those of the run alone."""
    widths = [str(width) for width in range(2, 26, 2)]
    flags = ["--model", "mlp", "--compile", "--steps", "3", "--width"]
    alone, = toy.main([*flags, widths[-1], "--out-dir", str(tmp_path / "alone")])
    sweep = toy.main([*flags, *widths, "--out-dir", str(tmp_path / "sweep")])
    assert sweep[-1]["error"] == alone["error"]
