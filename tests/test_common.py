"""common.py: GPT-2's blocks against NumPy, initialisation, devices, the run folder and the dealing out of runs."""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import common


def cut_and_continued(script, folder, flags, before, until):
    """Runs a command three times at once: whole, and cut off by Ctrl-C and by SIGKILL after the line `until`, then repeated.
    Asserts that the repetition does not print the evaluation `before`, whose checkpoint was safe by then, and that all three
    leave the same metrics and results. Returns what the whole run printed; its folder is folder / "0"."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(number):
        command = [sys.executable, "-u", str(script), *flags, "--out-dir", str(folder / f"{number}")]
        if number:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            while until not in process.stdout.readline() and process.poll() is None:
                pass
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
            assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]
            assert number == signal.SIGKILL or "saved at step" in error and "the same command" in error
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
        assert done.returncode == 0, done.stderr
        assert (before in done.stdout) == (not number)                           # it went on, it did not start again
        own, = (folder / f"{number}" / script.stem).iterdir()
        metrics = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics], (own / "results.json").read_text(), done.stdout
    with ThreadPoolExecutor(3) as pool:
        whole, *cut = pool.map(one, (0, int(signal.SIGINT), int(signal.SIGKILL)))
    assert all(other[:2] == whole[:2] for other in cut)
    return whole[2]


def call_main(monkeypatch, module, *flags):
    """The command in this process, which saves the seconds of importing torch; signals are handled as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    try:
        module.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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


def settings(tmp_path, **changes):
    return argparse.Namespace(**{**dict(preset="quick", seed=[0, 1], model=["a", "b"], size=dict(a=1, b=2), lr=0.1, dtype="float32",
                                        device="cpu", overwrite=False, plot=False, out_dir=str(tmp_path)), **changes})


def test_a_sweep_is_the_product_of_its_lists(tmp_path):
    runs = common.sweep(settings(tmp_path), {"quick": dict(model=["a"])}, over=["model", "seed"])
    assert [run.name for run in runs] == ["quick,seed=0", "quick,seed=1", "quick,model=b,seed=0", "quick,model=b,seed=1"]
    assert [(run.args.model, run.args.size, run.args.seed) for run in runs] == [("a", 1, 0), ("a", 1, 1), ("b", 2, 0), ("b", 2, 1)]


def start_run(tmp_path, **changes):
    run, = common.sweep(settings(tmp_path, seed=[0], model=["a"], **changes), {"quick": {}}, over=["model", "seed"])
    if not run.read("config.json"):
        run.write("config.json", json.dumps(run.config).encode())
    return run


def test_another_setting_is_refused_by_name(tmp_path, capsys):
    start_run(tmp_path)
    start_run(tmp_path, plot=True, preset="quick")                               # not a setting of the training
    with pytest.raises(SystemExit) as stop:
        start_run(tmp_path, lr=0.2)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "lr (0.1 there, 0.2 here)" in error and "--overwrite" in error and "--out-dir" in error
    assert "size" not in error
    assert start_run(tmp_path).read("config.json")["lr"] == 0.1                  # untouched
    assert start_run(tmp_path, lr=0.2, overwrite=True).read("config.json")["lr"] == 0.2


def test_a_checkpoint_brings_back_model_optimizer_generators_and_metrics(tmp_path):
    def fresh():
        common.seed_everything(0)
        model = torch.nn.Linear(3, 3)
        return model, torch.optim.AdamW(model.parameters(), fused=True), torch.Generator().manual_seed(5)

    def work(model, optimizer, data, steps):
        for _ in range(steps):
            x = torch.randn(4, 3, generator=data)
            torch.nn.functional.dropout(model(x), 0.5).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, data = fresh()
    work(model, optimizer, data, 10)
    expected = model.weight.clone(), torch.rand(1, generator=data), torch.rand(1)

    model, optimizer, data = fresh()
    run = start_run(tmp_path)
    assert run.restore(model=model, optimizer=optimizer, data=data) == 0
    work(model, optimizer, data, 4)
    run.log(4, loss=1.0)
    run.save(4)
    run.log(5, loss=2.0)                                                         # the step after the checkpoint is lost

    model, optimizer, data = fresh()
    run = start_run(tmp_path)
    assert run.restore(model=model, optimizer=optimizer, data=data) == 4
    assert [line["step"] for line in run.metrics] == [4]
    work(model, optimizer, data, 6)
    for a, b in zip((model.weight, torch.rand(1, generator=data), torch.rand(1)), expected):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path, capsys):
    run, model = start_run(tmp_path), torch.nn.Linear(2, 2)
    run.restore(model=model)
    run.save(3)
    with pytest.raises(SystemExit) as stop:
        run.log(7, loss=math.nan)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "step 7" in error and "learning rate 0.1" in error and "--lr" in error
    assert start_run(tmp_path).restore(model=model) == 3


def test_spread_and_table(capsys):
    assert common.spread([0.5]) == "0.500"
    assert common.spread([3, 1, 2], ".0f") == "2 [1, 3]"
    assert common.spread([None, 100, 200], ".0f") == "200 [100, -]"
    assert common.spread([None]) == "-"
    common.print_table(["a", "long"], [["100", "2"]])
    assert capsys.readouterr().out == "  a  long\n100     2\n"


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
