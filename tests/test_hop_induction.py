"""hop_induction.py: find against a string search, the model against NumPy, the construction, the machines, the command."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import hop_induction
from hop_induction import HopLSTM, HopTask, HopTransformer, construct, find, hop_errors
from test_common import generator, numpy_block, numpy_norm, refused
from test_documents import commands

TINY = ["--device", "cpu", "--n-layer", "2", "--n-embd", "16", "--seq-len", "12", "--max-hops", "2", "--batch-size", "8",
        "--steps", "60", "--warmup", "10", "--eval-every", "10", "--n-eval", "20"]


def plain_find(text, i, k):
    """find^k(i) by searching the string, None where undefined."""
    for _ in range(k):
        j = text.rfind(text[i], 0, i)
        if j < 0:
            return None
        i = j + 1
    return i


# ---- The task -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_chars, length", [(2, 30), (4, 30), (7, 30), (3, 6)])
def test_find_agrees_with_a_string_search(n_chars, length):
    chars = torch.randint(n_chars, (200, length), generator=generator(n_chars))  # neighbours may be equal: then a hop may stay
    for k in [*range(9), 16, 40]:                                                # in six characters, 40 hops are too many
        for row, found in zip(chars.tolist(), find(chars, k).tolist()):
            text = "".join("abcdefg"[c] for c in row)
            assert found == [-1 if (p := plain_find(text, i, k)) is None else p for i in range(length)]
    hops = torch.randint(41, (200,), generator=generator())
    together = find(chars, hops)
    assert all(torch.equal(together[b], find(chars[b:b + 1], int(hops[b]))[0]) for b in range(200))


def test_samples_are_the_papers_sequences():
    task = HopTask()
    assert (task.vocab_size, task.block_size, task.char, task.undefined, task.blank) == (30, 99, 17, 21, 22)
    tokens, targets = task.sample(3_000, generator())
    assert tokens.shape == targets.shape == (3_000, 99) and tokens.dtype == targets.dtype == torch.int64
    assert torch.bincount(tokens[:, 0], minlength=17).sub(3_000 / 17).abs().max() < 5 * math.sqrt(3_000 / 17)
    assert torch.bincount(tokens[:, 1] - 17, minlength=4).sub(750).abs().max() < 5 * math.sqrt(750)
    steps = (tokens[:, 2:] - tokens[:, 1:-1]) % 4
    assert torch.bincount(steps.flatten(), minlength=4)[0] == 0                   # no two neighbours are equal
    assert torch.bincount(steps.flatten(), minlength=4)[1:].sub(steps.numel() / 3).abs().max() < 5 * math.sqrt(steps.numel() / 3)
    for row, target in zip(tokens.tolist()[:300], targets.tolist()):
        text = "".join("abcd"[c - 17] for c in row[1:])
        hops = [plain_find(text, i, row[0]) for i in range(98)]
        assert target == [22] + [21 if p is None else row[1 + p] for p in hops]


def test_the_number_of_hops_can_be_given():
    task = HopTask(seq_len=20, max_hops=3)
    assert task.sample(3, generator(), hops=torch.tensor([3, 0, 1]))[0][:, 0].tolist() == [3, 0, 1]
    tokens, targets = task.sample(5, generator(), hops=0)
    assert torch.equal(tokens[:, 1:], targets[:, 1:])
    for hops in (4, -1, torch.tensor([0, 1, 4])):
        with pytest.raises(ValueError, match="0 to 3"):
            task.sample(3, generator(), hops=hops)


# ---- The models -------------------------------------------------------------------------------------------------------

def test_the_model_has_gpt2s_names_and_agrees_with_numpy():
    torch.manual_seed(0)
    model = HopTransformer(3, 4, 24, 30, 20).double()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert {name.split(".")[0] for name in w} == {"wte", "wpe", "h", "ln_f", "lm_head"}
    tokens = torch.randint(30, (2, 20))
    logits, attns = model(tokens, return_attn=True)
    torch.testing.assert_close(model(tokens), logits)
    for b in range(2):
        x = w["wte.weight"][tokens[b]] + w["wpe.weight"]
        for block, attn in zip(model.h, attns, strict=True):
            x, weights = numpy_block(block, x)
            np.testing.assert_allclose(attn[b].detach(), weights, atol=1e-10)
        np.testing.assert_allclose(logits[b].detach(), numpy_norm(x, model.ln_f) @ w["lm_head.weight"].T, atol=1e-9)


def test_parameter_counts_and_causality():
    model = HopTransformer(4, 4, 128, 30, 99)
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 13 * 128) + (2 * 30 + 99) * 128 + 2 * 128
    lstm = HopLSTM(2, 4, 64, 30, 99)
    n_params = 2 * (12 * 64**2 + 13 * 64) + (2 * 30 + 99) * 64 + 2 * 64
    assert sum(p.numel() for p in lstm.parameters()) == pytest.approx(n_params, rel=0.1)
    tokens = HopTask().sample(2, generator())[0]
    changed = tokens.clone()
    changed[:, 60:] = 17
    for net in (model, lstm, construct(16)):
        torch.testing.assert_close(net(tokens)[:, :60], net(changed)[:, :60])


# ---- Measurement ----------------------------------------------------------------------------------------------------

def test_errors_and_standard_errors_count_characters_alone():
    task = HopTask(seq_len=20, max_hops=3)

    def always_the_first_character(tokens):
        return F.one_hot(torch.full_like(tokens, task.char), task.vocab_size).float()
    errors, se = hop_errors(always_the_first_character, task, 300, generator(7), return_se=True)
    data = generator(7)
    for k in range(4):
        targets = torch.cat([task.sample(n, data, hops=k)[1] for n in (256, 44)])
        wrong, total = np.zeros(300), np.zeros(300)                              # of each sequence
        for row, sequence in enumerate(targets.tolist()):
            for target in sequence:
                if task.char <= target < task.undefined:
                    wrong[row] += target != task.char
                    total[row] += 1
        error = wrong.sum() / total.sum()
        assert errors[k].item() == pytest.approx(error, rel=1e-5)
        assert se[k].item() == pytest.approx(np.sqrt(((wrong - error * total)**2).sum()) / total.sum(), rel=1e-4)    # of a ratio
    again = torch.stack([hop_errors(always_the_first_character, task, 300, generator(i)) for i in range(40)])
    assert torch.allclose(again.std(0), se, rtol=0.5)                            # what it says is what it scatters


def shown(monkeypatch, runs, *results):
    """The cells of the table that show_errors prints of such results, by row and column."""
    tables = []
    monkeypatch.setattr(common, "print_table", lambda title, cells: tables.append(cells))
    n_hops = runs[0].args.max_hops + 1
    for run, result in zip(runs, results or [{}] * len(runs), strict=True):
        run.results = {**dict(errors=[0.0] * n_hops, se=[0.0] * n_hops), **result}
        run.args.label = f"{run.args.n_layer} layers{hop_induction.in_words(run.args)}"
    hop_induction.show_errors(runs)
    cells, = tables
    return {(row, column): value for row, column, value, *_ in cells}


def test_a_hop_that_never_occurs_is_not_solved():
    task = HopTask(seq_len=9, n_chars=40, max_hops=5)

    def perfect(tokens):
        positions = find(tokens[:, 1:], tokens[:, 0])
        chars = F.pad(tokens[:, 1:].gather(1, positions.clamp_min(0)), (1, 0))
        return F.one_hot(chars, task.vocab_size).float()
    errors = hop_induction.plain(hop_errors(perfect, task, 50, generator()))
    assert errors[:2] == [0, 0] and errors[3:] == [None] * 3                     # so few sequences have no third hop
    assert hop_induction.solved(errors) in (1, 2)
    assert hop_induction.solved([0.0, 0.01, 0.04, 0.05, 0.0]) == 2
    assert hop_induction.solved([0.0, 0.01, 0.04]) == 2 and hop_induction.solved([0.3, 0.01]) == 0


@pytest.mark.parametrize("k", [0, 1, 3])
def test_head_alignment_against_plain_loops(k):
    torch.manual_seed(0)
    task = HopTask(seq_len=16, max_hops=3)
    model = HopTransformer(2, 2, 16, task.vocab_size, task.block_size)
    for p in model.parameters():
        p.data.normal_()
    ours = hop_induction.head_alignment(model, task, k, n=4)
    tokens, _ = task.sample(4, generator(20_000), hops=k)
    attns = model(tokens, return_attn=True)[1]
    for layer in range(2):
        for head in range(2):
            for j in range(4):
                products = []
                for b, row in enumerate(tokens.tolist()):
                    A, text, F = attns[layer][b, head].detach().numpy(), "".join(map(chr, row[1:])), np.zeros((15, 15))
                    for i in range(14):
                        if (p := plain_find(text, i, j)) is not None:
                            F[i + 1, p + 1] = 1
                    products.append((A * F).sum() / np.linalg.norm(A) / max(np.linalg.norm(F), 1e-9))
                assert ours[layer][head][j] == pytest.approx(np.mean(products), abs=1e-5)


# ---- Theorem 4.2 ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("max_hops", range(1, 17))
def test_the_construction_makes_no_error(max_hops):
    model, task = construct(max_hops), HopTask(max_hops=max_hops)
    assert model.n_layer == math.floor(math.log2(max_hops)) + 2
    tokens, targets = task.sample(4 * (max_hops + 1), generator(max_hops), hops=torch.arange(max_hops + 1).repeat(4))
    logits, attns = model(tokens, return_attn=True)
    assert torch.equal(logits.argmax(-1), targets) and len(attns) == model.n_layer      # `undefined` and `blank` included
    for k in (0, 1, max_hops):                                                   # it looks at the same whatever k is
        alignment = hop_induction.head_alignment(model, task, k, n=4)
        for l in range(model.n_layer - 1):
            assert np.argmax(alignment[l + 1][0]) == 2**l


@pytest.mark.parametrize("n_chars, seq_len", [(2, 10), (3, 50), (9, 140)])
def test_the_construction_for_other_alphabets_and_lengths(n_chars, seq_len):
    task = HopTask(seq_len, n_chars, 6)
    tokens, targets = task.sample(20, generator())
    assert torch.equal(construct(6, n_chars, seq_len)(tokens).argmax(-1), targets)


@pytest.mark.slow
def test_the_construction_makes_no_error_on_a_thousand_sequences():
    model, task, data = construct(16), HopTask(), generator()
    for k in range(17):
        for _ in range(10):
            tokens, targets = task.sample(100, data, hops=k)
            assert torch.equal(model(tokens).argmax(-1), targets)


# ---- Parallel machines ------------------------------------------------------------------------------------------------

def test_the_machines_agree_with_find_in_two_rounds_a_doubling():
    rng, rounds = random.Random(0), {}
    hops = [0, 1, 2, 3, 4, 7, 8, 16]
    for trial in range(40):
        N, q, k = rng.randint(300, 500), rng.randint(14, 60), hops[trial % 8]    # with q = 60 some machines stay empty
        X = [rng.randrange(4) for _ in range(N)]
        hop, cluster = hop_induction.mpc_hops(X, k, q, N - 1)
        text = "".join("abcd"[c] for c in X)
        assert hop == [-1 if (p := plain_find(text, i, k)) is None else X[p] for i in range(N)]
        rounds[k] = cluster.rounds
    assert [rounds[2**l] - rounds[1] for l in range(1, 5)] == [2, 4, 6, 8]


@pytest.mark.parametrize("messages", [
    [(0, 1, (1, 2)), (0, 2, (3, 4, 5))],                                         # sent by machine 0
    [(0, 2, (1, 2)), (1, 2, (3, 4, 5))],                                         # received by machine 2
    [(2, 0, (1, 2))],                                                            # held by machine 0, which has three
])
def test_one_word_too_many_is_caught(messages):
    cluster = hop_induction.Cluster(3, 4)
    assert cluster.exchange([(0, 1, (1, 2)), (0, 2, (3, 4))]) == [[], [(1, 2)], [(3, 4)]]
    cluster.words[0]["x"] = {7: 0, 8: 0, 9: 0}
    with pytest.raises(ValueError, match="round 2 takes 5 words, a machine has 4"):
        cluster.exchange(messages)


def test_machines_need_words_but_may_not_hold_the_whole_input():
    X = HopTask(302).sample(1, generator())[0][0, 1:].sub(17).tolist()
    with pytest.raises(ValueError, match="whole input of 300"):
        hop_induction.mpc_hops(X, 16, 16, 300)
    most = hop_induction.mpc_hops(X, 16, 16, 299)[1]
    enough = max(most.memory, most.load)
    hop_induction.mpc_hops(X, 16, 16, enough)
    with pytest.raises(ValueError, match=f"takes {enough} words, a machine has {enough - 1}"):
        hop_induction.mpc_hops(X, 16, 16, enough - 1)


# ---- Training and the command -----------------------------------------------------------------------------------------

def runs_of(*flags):
    args = hop_induction.parse_args(["--device", "cpu", *flags])
    return common.sweep(args, hop_induction.SWEEP, hop_induction.build, hop_induction.resolve, measured=["n_eval"])


def one_run(tmp_path, *flags):
    run, = runs_of(*TINY, "--out-dir", str(tmp_path), *flags)
    common.seed_everything(0)
    return run


def main(tmp_path, *flags):
    """The results of a tiny run or sweep."""
    return hop_induction.main([*TINY, "--out-dir", tmp_path, *flags])


def test_a_finite_training_set_is_used_in_whole_batches_and_a_fixed_order(tmp_path, monkeypatch):
    run = one_run(tmp_path, "--n-train", "20", "--steps", "5")
    seen = []
    forward = HopTransformer.forward
    monkeypatch.setattr(HopTransformer, "forward", lambda self, tokens, *rest: (
        seen.append(tokens.clone()) if self.training else None, forward(self, tokens, *rest))[1])
    hop_induction.train(run.args, run)
    fixed = HopTask(12, 4, 2).sample(16, generator(0))[0]                        # two batches of 8
    assert torch.equal(torch.cat(seen), fixed[torch.arange(40) % 16])


def test_the_learning_rate_warms_up_and_falls_to_zero(tmp_path, monkeypatch):
    run, rates = one_run(tmp_path, "--steps", "40", "--lr", "2e-3"), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(float(self.param_groups[0]["lr"])), step(self))[1])
    hop_induction.train(run.args, run)
    warmup, peak = 10, 2e-3
    expected = [peak * t / warmup for t in range(10)] + [peak * (40 - t) / (40 - warmup) for t in range(10, 40)]
    assert rates == pytest.approx(expected, rel=1e-5) and rates[10] == pytest.approx(peak)


# of the transformer the embeddings, and twice in each layer; of the LSTM what goes in and what comes out
@pytest.mark.parametrize("arch, n_places", [("transformer", 5), ("lstm", 2)])
def test_dropout_is_where_gpt2_has_it(tmp_path, monkeypatch, arch, n_places):
    seen = []

    def watched(x, p=0.5, training=True, inplace=False):
        seen.append((p, training, tuple(x.shape)))
        return x
    monkeypatch.setattr(F, "dropout", watched)
    _, model = hop_induction.build(one_run(tmp_path, "--arch", arch, "--dropout", "0.1").args)
    model(torch.zeros(1, 11, dtype=torch.long))
    assert seen == [(0.1, True, (1, 11, 16))] * n_places


@pytest.mark.parametrize("arch", ["transformer", "lstm"])
def test_training_moves_every_parameter_and_lowers_the_loss(tmp_path, arch):
    run = one_run(tmp_path, "--arch", arch, "--beta2", "0.9", "--weight-decay", "0.3")
    _, before = hop_induction.build(run.args)
    common.seed_everything(0)
    hop_induction.train(run.args, run)
    ckpt = torch.load(run.folder / "ckpt.pt", weights_only=True)
    assert all(not torch.equal(p, ckpt["model"][name]) for name, p in before.named_parameters())
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    group, = ckpt["optimizer"]["param_groups"]
    assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.3


def published_rows(monkeypatch, *flags):
    """For each run of a command: its args, and what the table has from the paper, a list of (k, error)."""
    runs = runs_of(*flags, "--out-dir", "/nonexistent")
    cells = shown(monkeypatch, runs)
    found = []
    for run in runs:
        own = {row: value for (row, column), value in cells.items() if column == run.args.label}
        rows = [(int(row[2:-7]), value) for row, value in own.items() if row.endswith(", paper")]
        found.append((run.args, rows))
    return found


def test_the_papers_commands_print_what_the_paper_has(monkeypatch):
    seen = set()
    for _, flags in commands("hop_induction.py"):
        flags = [flag for flag in flags if flag != "--plot"]
        if "paper" in flags:
            for args, rows in published_rows(monkeypatch, *flags):
                seen.add((args.n_layer, args.n_head, args.n_train))
                assert args.n_embd == (256 if args.n_head == 8 else 128) and args.dropout == 0.1
                errors = [error for _, error in rows]
                assert errors and sorted(errors) == errors                       # more hops, more errors
    assert seen == {*itertools.product(range(2, 7), [4, 8], [0]), (4, 4, 1000), (4, 4, 3000)}


@pytest.mark.parametrize("other", [
    "--n-head 8", "--dropout 0", "--steps 1000", "--lr 1e-3", "--seq-len 90", "--n-chars 5", "--batch-size 64", "--arch lstm",
    "--n-train 50", "--n-embd 256", "--warmup 10", "--beta2 0.98", "--weight-decay 0.1"])
def test_the_papers_numbers_stand_beside_the_papers_setting_alone(monkeypatch, other):
    (_, rows), = published_rows(monkeypatch, "--preset", "paper", "--n-layer", "4", "--dtype", "bfloat16", "--compile", "--seed", "5")
    assert [k for k, _ in rows] == [1, 2, 3, 4, 6, 8, 12, 16]                    # how it is computed makes no other setting
    (_, rows), = published_rows(monkeypatch, "--preset", "paper", "--n-layer", "4", *other.split())
    assert rows == []


@pytest.mark.parametrize("flags, line", [
    ("--n-head 3", "n_embd 16 is not divisible by n_head 3"),
    ("--seq-len 5", "no seq_len 5"),
    ("--n-chars 1", "n_chars 1"),
    ("--n-train 0 7", "n_train 7 is less than one batch of 8"),
    ("--arch lstm --n-head 2", "--n-head has no effect"),
    ("--preset construct --max-hops 97", "max_hops 97"),
    ("--preset mpc --seq-len 300", "could hold the whole input"),
])
def test_what_cannot_be_is_one_line_before_anything_is_written(tmp_path, flags, line):
    assert line in refused(hop_induction.main, tmp_path, *TINY, *flags.split())


def test_one_training_for_equal_settings(tmp_path):
    results = main(tmp_path, "--arch", "transformer", "lstm", "--n-head", "2", "4", "--steps", "4")
    assert len(results) == len({result["folder"] for result in results}) == 3    # an LSTM has no heads


def test_attention_of_a_loaded_model(tmp_path):
    result, = main(tmp_path)
    task, model = hop_induction.load(result["folder"])
    tokens, targets = task.sample(1, generator(), hops=2)
    logits, attns = model(tokens, return_attn=True)
    assert attns[1].shape == (1, 4, 11, 11) and not model.training               # of layer 2, (B, H, N, N)
    torch.testing.assert_close(attns[1].sum(-1), torch.ones(1, 4, 11))
    errors = hop_errors(model, task, 20, generator(30_000))
    assert errors.tolist() == result["errors"]


class Mean(torch.nn.Module):
    """A toy architecture: a linear map of the mean of all embeddings so far."""

    def __init__(self, n_layer, n_head, n_embd, vocab_size, block_size, dropout=0.0):
        super().__init__()
        self.wte = torch.nn.Embedding(vocab_size, n_embd)
        self.lm_head = torch.nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self.lm_head(self.wte(tokens).cumsum(1) / counts[:, None])


def test_an_architecture_is_added_in_one_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(hop_induction.ARCHS, "mean", Mean)
    results = main(tmp_path, "--arch", "transformer", "mean", "--steps", "4")
    out = capsys.readouterr().out
    assert len(results) == 2 and "2 layers, mean" in out and "2 layers, layer 1" in out


def test_tables_fit_in_a_hundred_columns(tmp_path, capsys):
    flags = ["--max-hops", "16", "--seq-len", "40", "--steps", "1", "--n-eval", "2", "--n-head", "8", "--seed", "0", "1"]
    main(tmp_path, *flags, "--n-layer", "2", "3")
    hop_induction.main(["--preset", "construct", "--n-eval", "1", "--device", "cpu"])
    hop_induction.main(["--preset", "mpc", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if ",seed=" not in line) <= 100       # but for the names of runs


def test_construct_and_mpc_return_their_tables(capsys):
    results = hop_induction.main(["--preset", "construct", "--max-hops", "3", "--n-eval", "60", "--device", "cpu"])
    out = capsys.readouterr().out
    assert results == [dict(k=k, error=0) for k in range(4)]
    assert "find^2" in out and "Largest error 0, by depth 3 = floor(log2 3) + 2" in out and "N = 100" in out
    task = HopTask(max_hops=3)
    always_undefined = F.one_hot(torch.tensor(task.undefined), task.vocab_size).float()
    errors = hop_errors(lambda tokens: always_undefined.expand(*tokens.shape, -1), task, 20, generator(), everywhere=True)
    for k, error in enumerate(errors.tolist()):                                  # a constant answer is wrong but there
        _, targets = task.sample(20, generator(), hops=k)
        assert error == pytest.approx((targets != task.undefined).float().mean().item(), abs=0.02)
    results = hop_induction.main(["--preset", "mpc", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "1000 characters by 32 machines of 320 words" in out and "doubling of k adds: [2 2 2 2]" in out
    for result, k in zip(results, (1, 2, 4, 8, 16), strict=True):
        assert result["k"] == k and result["right"]
        assert result["rounds"] == 3 + 2 * k.bit_length() and result["depth"] == math.floor(math.log2(k)) + 2
        assert result["load"] <= 320 and 3 * 1000 / 32 < result["memory"] <= 320     # a character, two pointers


def test_the_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    main(tmp_path, "--plot", "--steps", "10", "--arch", "lstm")
    folder = tmp_path / "hop_induction"
    assert [path.name for path in folder.glob("*.png")] == ["errors.png"]        # an LSTM has no heads
    main(tmp_path, "--plot", "--steps", "10", "--n-layer", "1", "2", "--seed", "0", "1", "--arch", "transformer", "lstm")
    figures = sorted(folder.glob("*.png"))
    assert [path.name for path in figures] == ["attention.png", "errors.png", "heads.png"]
    assert all(path.stat().st_size > 5_000 for path in figures)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_compiled_and_in_bfloat16(tmp_path):
    result, = main(tmp_path, "--device", "cuda", "--compile", "--dtype", "bfloat16")
    assert "failed" not in result


@pytest.mark.slow
@pytest.mark.parametrize("seed", [20, 24])
def test_hops_double_with_each_layer(tmp_path, one_thread, seed):
    results = hop_induction.main(["--device", "cpu", "--seed", seed, "--out-dir", tmp_path])
    two, three, four = [hop_induction.solved(result["errors"]) for result in results]
    assert two == 1 and three in (2, 3) and four >= 4


def test_the_loss_counts_all_positions_of_the_sequences_of_the_seed(tmp_path):
    run = one_run(tmp_path, "--steps", "1", "--seed", "3")
    task, model = hop_induction.build(run.args)
    common.seed_everything(0)
    hop_induction.train(run.args, run)                                           # the same initial weights
    tokens, targets = task.sample(8, generator(3))
    expected = F.cross_entropy(model(tokens).mT, targets).item()
    assert run.metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_figure_of_errors_shows_medians_and_what_is_published(monkeypatch, figures):
    runs = runs_of("--preset", "paper", "--n-layer", "4", "--seed", "0", "1", "2", "--plot")
    cells = shown(monkeypatch, runs, *[dict(errors=[x] * 16 + [None]) for x in (0.1, 0.2, 0.9)])
    axis, = figures["errors"].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert lines["4 layers"].get_xydata()[:16].tolist() == [[k, 0.2] for k in range(16)]
    assert cells["k=16", "4 layers"] is None and math.isnan(lines["4 layers"].get_ydata()[16])     # such hops never occurred: a gap
    paper = lines["4 layers, paper"]
    assert dict(paper.get_xydata().tolist())[8] == 0.068 and len(paper.get_xydata()) == 8
    assert paper.get_color() == lines["4 layers"].get_color() and paper.get_fillstyle() == "none"
    assert set(lines["a random character"].get_ydata()) == {0.75} and set(lines["solved: below 5%"].get_ydata()) == {0.05}


@pytest.mark.parametrize("hops, line", [
    ([1, 3, 6], "2 layers 1 (1), 3 layers 3 (3), 4 layers 6 (7).\nOne more layer makes over 1.5 times as many, or all 8, in 2 of 2 cases."),
    ([2, 4, 8], "2 layers 2 (1), 3 layers 4 (3), 4 layers 8 (7).\nOne more layer makes over 1.5 times as many, or all 8, in 2 of 2 cases."),
    ([1, 2, 3], "2 layers 1 (1), 3 layers 2 (3), 4 layers 3 (7).\nOne more layer makes over 1.5 times as many, or all 8, in 1 of 2 cases."),
    ([0, 0, 8], "2 layers 0 (1), 3 layers 0 (3), 4 layers 8 (7).\nOne more layer makes over 1.5 times as many, or all 8, in 1 of 2 cases."),
    ([8, 8], "2 layers 8 (1), 3 layers 8 (3).\n"),                               # no more to solve says nothing
    ([3], "2 layers 3 (1).\n"),
])
def test_the_verdict(capsys, hops, line):
    runs = runs_of("--n-layer", *map(str, range(2, 2 + len(hops))))
    for run, n in zip(runs, hops, strict=True):
        run.results = dict(errors=[0.0] * (n + 1) + [0.5] * (8 - n))
    lstm, = runs_of("--arch", "lstm", "--n-layer", "2")                          # not of the theorem
    lstm.results = dict(errors=[0.0] * 9)
    hop_induction.verdict([lstm, *runs])
    assert capsys.readouterr().out.strip().endswith(line.strip())


def test_the_figures_of_heads(tmp_path, figures):
    run = one_run(tmp_path, "--steps", "1")
    hop_induction.train(run.args, run)
    alignment = torch.full((3, 2, 4, 3), 0.1)                                    # by k, layer, head and j
    alignment[0] = 0.9                                                           # without meaning: the attention is of k = 2
    alignment[2, 0, 2, 1], alignment[2, 1, 1, 2] = 0.3, 0.6
    run.results = dict(alignment=alignment.tolist())
    hop_induction.plot_heads(run)
    for axis, k in zip(figures["heads"].axes, (1, 2), strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), alignment[k].flatten(0, 1))
        assert axis.get_title().endswith(f"asked for {k} hops")
    task, model = hop_induction.load(run.folder)
    tokens, _ = task.sample(1, generator(0), hops=2)
    attns = model(tokens, return_attn=True)[1]
    text = "".join(map(chr, tokens[0, 1:]))
    axes = figures["attention"].axes
    for j, layer, head in (1, 0, 2), (2, 1, 1):
        assert axes[layer].get_title() == f"head {layer + 1}.{head + 1} and find^{j}"
        assert torch.equal(torch.tensor(axes[layer].images[0].get_array().data), attns[layer][0, head].detach())
        found = [(plain_find(text, i, j), i) for i in range(len(text))]
        circles = [[[p + 1, i + 1]] for p, i in found if p is not None]          # where find^j leads
        assert [line.get_xydata().tolist() for line in axes[layer].lines] == circles


def test_heads_are_shown_by_the_number_of_hops_asked_for(capsys):
    run, = runs_of(*TINY, "--max-hops", "4")
    alignment = torch.rand(5, 2, 4, 5, generator=generator()) / 2                # by k, layer, head and j
    best = {(1, 0): (3, 0), (1, 1): (1, 4), (2, 0): (2, 1), (2, 1): (4, 2), (4, 0): (1, 3), (4, 1): (2, 0)}
    for (k, layer), (head, j) in best.items():
        alignment[k, layer, head - 1, j] = 0.5 + k / 10 + layer / 100
    run.args.label = "2 layers"
    run.results = dict(alignment=alignment.tolist())
    hop_induction.show_heads(run.args, [run])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for layer in (0, 1):
        cells = []
        for k in (1, 2, 4):
            cells += [f"find^{best[k, layer][1]}", f"{0.5 + k / 10 + layer / 100:.2f}"]
        assert ["2", "layers,", "layer", str(layer + 1), *cells] in rows
    built = [row for row in rows if row[:3] == ["hand-built,", "layer", "3"]]
    assert [row[3::2] for row in built] == [["find^2"] * 3]                      # the construction's: whatever k is
