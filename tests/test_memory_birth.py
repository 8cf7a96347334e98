"""memory_birth.py: the task against its definition, the model against NumPy, the probes, the command from end to end."""
import bisect
import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import memory_birth
from memory_birth import BigramTask, FullTransformer, SimpleTransformer
from test_common import generator, metrics_of, refused

TINY = ["--device", "cpu", "--seq-len", "16", "--n-embd", "16", "--batch-size", "32", "--steps", "60", "--eval-every", "10"]


def call_main(*flags):
    return memory_birth.main(flags)


# ---- The embedded pair counts -----------------------------------------------------------------------------------------

def test_the_embedded_counts_are_those_of_one_text():
    pairs = memory_birth.shakespeare_pairs()
    assert pairs.shape == (65, 65) and pairs.sum() == 1_115_393 and (pairs > 0).sum() == 1_403
    ends = (pairs.sum(1) - pairs.sum(0)).tolist()                                # a path leaves its first, enters its last
    assert sorted(ends) == [-1] + [0] * 63 + [1]
    assert memory_birth.CHARS[ends.index(1)] == "F" and memory_birth.CHARS[ends.index(-1)] == "\n"
    task = BigramTask()
    count = dict(zip(task.chars, (task.unigram * 1_115_394).round().int().tolist()))
    assert task.vocab_size == 65 and sum(count.values()) == 1_115_394
    assert (count["\n"], count[" "], count["e"], count["$"]) == (40_000, 169_892, 94_611, 1)
    assert [task.chars[c] for c in task.fixed] == [" ", "e", "t", "o", "a"]


def test_a_text_file_gives_its_own_counts(tmp_path):
    text = "abracadabra!"
    (tmp_path / "text").write_text(text)
    task = BigramTask(k=2, text=tmp_path / "text")
    assert task.chars == "!abcdr"
    for a, char in enumerate(task.chars):
        assert task.unigram[a].item() == pytest.approx(text.count(char) / len(text))
        after = [text[i + 1] for i in range(len(text) - 1) if text[i] == char] or text           # "!" has no successor
        for b, other in enumerate(task.chars):
            assert task.bigram[a, b].item() == pytest.approx([*after].count(other) / len(after))


# ---- The task ---------------------------------------------------------------------------------------------------------

def plain_sample(task, outputs, rng):
    """One sequence, from the definition: tokens, and its triggers."""
    def draw(p):
        cumulated = list(itertools.accumulate(p))
        return bisect.bisect_right(cumulated, rng.random() * cumulated[-1])

    unigram, bigram, V = task.unigram.tolist(), task.bigram.tolist(), task.vocab_size
    if task.triggers == "fixed":
        triggers = sorted(range(V), key=lambda v: -unigram[v])[:task.k]
    else:
        triggers, p = [], list(unigram)
        for _ in range(task.k):
            triggers.append(draw(p))
            p[triggers[-1]] = 0.0
    outputs = {q: rng.randrange(V) if outputs == "uniform" else draw(bigram[q]) for q in triggers}
    tokens = [draw(unigram)]
    for _ in range(task.seq_len):
        tokens.append(outputs[tokens[-1]] if tokens[-1] in outputs else draw(bigram[tokens[-1]]))
    return tokens, triggers


@pytest.mark.parametrize("triggers", ["fixed", "random"])
@pytest.mark.parametrize("outputs", ["uniform", "bigram"])
def test_samples_follow_the_definition(triggers, outputs):
    task = BigramTask(k=5, seq_len=48, triggers=triggers, outputs=outputs)
    n, V = 3_000, task.vocab_size
    tokens, occurrence = task.sample(n, generator())
    assert tokens.shape == (n, 49) and occurrence.shape == (n, 48) and tokens.dtype == torch.int64
    bigram, seen = task.bigram, torch.zeros(V, V)
    for z, occ in zip(tokens.tolist(), occurrence.tolist()):
        output, count = {}, {}
        for t in range(48):
            if occ[t]:
                count[z[t]] = count.get(z[t], 0) + 1
                assert occ[t] == count[z[t]]                                     # n-th time so far
                assert output.setdefault(z[t], z[t + 1]) == z[t + 1]             # always the same successor
            else:
                assert z[t] not in count and bigram[z[t], z[t + 1]] > 0
                seen[z[t], z[t + 1]] += 1
        assert len(count) <= 5
        if triggers == "fixed":
            assert set(count) == set(z[:-1]) & set(task.fixed.tolist())
    # pi_b after everything else, pi_u at the start: total variation against the expected noise
    for a in seen.sum(1).topk(8).indices:
        noise = 0.5 * (2 * bigram[a] / math.pi / seen[a].sum()).sqrt().sum()
        assert 0.5 * (seen[a] / seen[a].sum() - bigram[a]).abs().sum() < 1.5 * noise
    first = torch.bincount(tokens[:, 0], minlength=V) / n
    assert 0.5 * (first - task.unigram).abs().sum() < 1.5 * 0.5 * (2 * task.unigram / math.pi / n).sqrt().sum()


@pytest.mark.parametrize("triggers", ["fixed", "random"])
def test_samples_are_distributed_as_a_plain_implementation(triggers):
    task, n, rng = BigramTask(k=3, seq_len=32, triggers=triggers), 4_000, random.Random(0)
    plain = [plain_sample(task, "uniform", rng) for _ in range(n)]
    repeats, trigger_count, last = 0, torch.zeros(65), torch.zeros(65)
    for tokens, q in plain:
        for trigger in q:
            trigger_count[trigger] += trigger in tokens[:-1]
            repeats += max(0, tokens[:-1].count(trigger) - 1)
        last[tokens[-1]] += 1
    _, occurrence = task.sample(100_000, generator(2))                           # many: only the plain ones are noisy
    assert (occurrence >= 2).sum().item() / 100_000 == pytest.approx(repeats / n, rel=0.06)
    tokens, occurrence = task.sample(n, generator(1))
    ours = torch.bincount(tokens[:, :-1][occurrence == 1], minlength=65)         # sequences in which it was a trigger
    for v in trigger_count.topk(8).indices:
        assert ours[v].item() == pytest.approx(trigger_count[v].item(), abs=5 * math.sqrt(trigger_count[v]) + 5)
    ours = torch.bincount(tokens[:, -1], minlength=65)
    for v in last.topk(8).indices:
        assert ours[v].item() == pytest.approx(last[v].item(), abs=5 * math.sqrt(2 * last[v]))


@pytest.mark.parametrize("outputs", ["uniform", "bigram"])
def test_without_self_loops_outputs_are_the_other_characters(outputs):
    n = 20_000
    for self_loops in (True, False):
        task = BigramTask(k=5, seq_len=12, outputs=outputs, self_loops=self_loops)
        tokens, occurrence = task.sample(n, generator())
        first = occurrence == 1                                                  # each output once
        pairs = torch.bincount(tokens[:, :-1][first] * 65 + tokens[:, 1:][first], minlength=65**2).view(65, 65)
        assert (pairs.diagonal().sum() > 0) == self_loops
        for q in task.fixed:
            expected = task.bigram[q].clone() if outputs == "bigram" else torch.full((65,), 1 / 65)
            if not self_loops:
                expected[q] = 0
                expected /= expected.sum()
            noise = 0.5 * (2 * expected / math.pi / pairs[q].sum()).sqrt().sum()
            assert 0.5 * (pairs[q] / pairs[q].sum() - expected).abs().sum() < 1.5 * noise


def test_fixed_triggers_after_an_offset_are_the_less_frequent_characters(tmp_path):
    (tmp_path / "text").write_text(text := "eeeee tttt aaa oo n" * 3)
    common_first = sorted(set(text), key=lambda char: -text.count(char))         # e, t and " ", a, o, n
    task = BigramTask(k=2, seq_len=40, triggers="fixed:3", text=tmp_path / "text")
    assert [task.chars[q] for q in task.fixed] == common_first[3:5] == ["a", "o"]
    tokens, occurrence = task.sample(200, generator())
    assert set(tokens[:, :-1][occurrence > 0].tolist()) == set(task.fixed.tolist())
    probed = memory_birth.probes(SimpleTransformer(6, 40, 8), task)
    assert 2 * probed["wk2"] == round(2 * probed["wk2"]) and "wk2_triggers" in probed
    shakespeare = BigramTask(triggers="fixed:10")
    by_rank = sorted(range(65), key=lambda v: -shakespeare.unigram[v].item())
    assert shakespeare.fixed.tolist() == by_rank[10:15] and [shakespeare.chars[q] for q in by_rank[10:15]] == list("\nldum")


@pytest.mark.parametrize("text, settings, error", [
    ("", dict(k=1), "1 triggers need 1 characters; there are 0"),
    ("abcdef", dict(k=3, triggers="fixed:4"), "3 triggers need 7 characters; there are 6"),
    ("abcdef", dict(k=3, triggers="fixed:-1"), "fixed:OFFSET"),
    ("abaab cccc", dict(k=1, outputs="bigram", self_loops=False), "self-loops"),
    ("abaab cccc", dict(k=1, outputs="uniform", self_loops=False), "self-loops"),        # it is measured on both kinds
])
def test_tasks_that_cannot_be_are_refused(tmp_path, text, settings, error):
    (tmp_path / "text").write_text(text)
    with pytest.raises(ValueError, match=error):
        BigramTask(text=tmp_path / "text", **settings)


def test_a_vocabulary_without_a_text_is_uniform():
    task = BigramTask(k=2, seq_len=5, triggers="random", vocab_size=9, self_loops=False)
    assert task.vocab_size == len(set(task.chars)) == 9
    assert (task.unigram == 1 / 9).all() and (task.bigram == 1 / 9).all()
    tokens, _ = task.sample(2_000, generator())
    assert torch.bincount(tokens.flatten(), minlength=9).min() > 0.9 * tokens.numel() / 9


def test_sampling_depends_on_the_generator_alone():
    task = BigramTask(seq_len=20)
    a, b = task.sample(8, generator(3)), task.sample(8, generator(3))
    torch.manual_seed(1)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], task.sample(8, generator(4))[0])


# ---- The models -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use_wf", [False, True])
def test_the_simple_model_agrees_with_numpy(use_wf):
    torch.manual_seed(0)
    model = SimpleTransformer(11, 9, 8, use_wf).double()
    w = {name: x.detach().numpy() for name, x in [*model.named_parameters(), *model.named_buffers()]}
    tokens = torch.randint(11, (3, 7))
    logits, attns = model(tokens, return_attn=True)

    def layer(x, W_K, W_OV):
        y, weights = x.copy(), np.zeros((len(x), len(x)))
        for t in range(len(x)):
            scores = np.array([x[t] @ W_K @ x[s] / math.sqrt(8) for s in range(t + 1)])
            weights[t, :t + 1] = np.exp(scores) / np.exp(scores).sum()
            y[t] += W_OV @ sum(weights[t, s] * x[s] for s in range(t + 1))
        return y, weights

    for b in range(3):
        x = w["W_E"][tokens[b]] + w["P"][:7]
        x, first = layer(x, w["W_K1"], w["W_O1"] @ w["W_V1"])
        x, second = layer(x, w["W_K2"], w["W_O2"] @ w["W_V2"])
        if use_wf:
            x = x + x @ w["W_F"].T
        np.testing.assert_allclose(logits[b].detach(), x @ w["W_U"].T, atol=1e-10)
        np.testing.assert_allclose(attns[0][b, 0].detach(), first, atol=1e-12)
        np.testing.assert_allclose(attns[1][b, 0].detach(), second, atol=1e-12)


def test_parameter_counts_and_initial_scales():
    torch.manual_seed(0)
    model = SimpleTransformer(65, 256, 128, use_wf=True)
    assert sum(p.numel() for p in model.parameters()) == 4 * 128**2
    assert {name for name, _ in model.named_parameters()} == {"W_K1", "W_K2", "W_O2", "W_F"}
    bound = 1 / math.sqrt(128)
    for W in (model.W_K1, model.W_K2, model.W_O2, model.W_F, model.W_U, model.W_V1, model.W_O1, model.W_V2):
        assert 0.99 * bound < W.abs().max() <= bound and W.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert model.W_E.std().item() == pytest.approx(1, rel=0.05) and model.P.std().item() == pytest.approx(1, rel=0.05)
    full = FullTransformer(65, 256, n_layer=3, n_head=4, n_embd=128)
    assert sum(p.numel() for p in full.parameters()) == (2 * 65 + 256) * 128 + 2 * 128 + 3 * (12 * 128**2 + 13 * 128)


@pytest.mark.parametrize("model", [SimpleTransformer(65, 20, 32, True), FullTransformer(65, 20, 2, 4, 32)])
def test_no_prediction_sees_the_future(model):
    tokens = torch.randint(65, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 65
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


# ---- The probes: the induction head that the paper builds by hand (Sec. 4.2) --------------------------------------------

@torch.no_grad()
def constructed(task, d=1024, strength=100.0):
    """W_K1, W_K2, W_O2 as sums of outer products, and W_F = 0: the associative memories of an induction head."""
    torch.manual_seed(0)
    model = SimpleTransformer(task.vocab_size, task.seq_len, d, use_wf=True)
    E, P, U = model.W_E / math.sqrt(d), model.P / math.sqrt(d), model.W_U * math.sqrt(3)          # unit rows, roughly
    previous = E @ (model.W_O1 @ model.W_V1).mT
    model.W_K1.copy_(strength * P[1:].mT @ P[:-1])
    model.W_K2.copy_(strength * E.mT @ (previous / previous.norm(dim=1, keepdim=True)))
    model.W_O2.copy_(strength * U.mT @ (E @ model.W_V2.mT * math.sqrt(3)))
    model.W_F.zero_()
    return model


def test_the_probes_and_the_measurements_read_a_constructed_induction_head():
    task = BigramTask(k=5, seq_len=48, triggers="random")
    model = constructed(task)
    held = memory_birth.probes(model, task)
    assert held["wk1"] == held["wk2"] == held["wo2"] == held["wk1_64"] == 1
    uniform = sum((row * (row.clamp_min(1e-30) * 65).log()).sum() for row in task.bigram).item() / 65
    assert held["wf"] == pytest.approx(uniform, rel=1e-4)
    seen = memory_birth.evaluate(model, task, n=64)
    assert seen["accuracy"] > 0.95 and seen["attn_prev"] > 0.98 and seen["attn_match"] > 0.95
    for W, probe in (model.W_K1, "wk1"), (model.W_K2, "wk2"), (model.W_O2, "wo2"):
        with torch.no_grad():
            kept = W.clone()
            W.neg_()
        assert memory_birth.probes(model, task)[probe] < 0.1                     # each probe reads its own matrix
        assert memory_birth.evaluate(model, task, n=64)["accuracy"] < 0.5        # and each memory is needed
        with torch.no_grad():
            W.copy_(kept)


def test_what_w_o2_writes_is_read_by_w_f_too():
    task = BigramTask(k=5, seq_len=12)
    torch.manual_seed(5)
    model = SimpleTransformer(65, 12, 32, use_wf=True)
    W_E, W_U, W_F, W_O2, W_V2 = (getattr(model, name).detach().numpy() for name in ("W_E", "W_U", "W_F", "W_O2", "W_V2"))
    for scale, right in (0, False), (1, True):                                   # W_O2 is right with W_F alone, not without
        with torch.no_grad():
            read = model.W_U + scale * model.W_U @ model.W_F
            model.W_O2.copy_(torch.linalg.pinv(read) @ torch.eye(65) @ torch.linalg.pinv(model.W_E @ model.W_V2.mT).mT)
        through_wf = 0
        for v in range(65):
            g = W_O2 @ W_V2 @ W_E[v]
            through_wf += (W_U @ (g + W_F @ g)).argmax() == v
        held = memory_birth.probes(model, task)
        assert held["wo2_wf"] == pytest.approx(through_wf / 65)
        assert (held["wo2_wf"] > held["wo2"]) == right and held["wo2_wf"] != held["wo2"]
    assert "wo2_wf" not in memory_birth.probes(SimpleTransformer(65, 12, 32), task)


def test_probes_of_fixed_triggers_look_at_those_alone():
    fixed, free = BigramTask(k=5, seq_len=48), BigramTask(k=5, seq_len=48, triggers="random")
    model = constructed(fixed)
    with torch.no_grad():                                                        # a bigram memory for non-triggers alone
        U, E = model.W_U.double(), model.W_E.double()
        target = fixed.bigram.double().clamp_min(1e-9).log()
        target[fixed.fixed] = 0
        model.W_F.copy_((torch.linalg.pinv(U) @ target.mT @ torch.linalg.pinv(E.mT)).float())
        rare = fixed.unigram.argmin()
        model.W_K2 -= torch.outer(model.W_E[rare], (model.W_O1 @ model.W_V1 @ model.W_E[rare]))
    assert memory_birth.probes(model, fixed)["wf"] < 1e-3 < memory_birth.probes(model, free)["wf"]
    assert memory_birth.probes(model, fixed)["wk2"] == 1 > memory_birth.probes(model, free)["wk2"]


def test_the_key_is_looked_for_among_all_characters_and_among_the_triggers():
    task = BigramTask(k=20, seq_len=12)
    torch.manual_seed(4)
    model = SimpleTransformer(65, 12, 24)
    with torch.no_grad():                                                        # some keys are right, among many or few
        model.W_K2 += 0.02 * model.W_E.mT @ model.W_E @ (model.W_O1 @ model.W_V1).mT
    E, W_K2, W_OV1 = (x.detach().numpy() for x in (model.W_E, model.W_K2, model.W_O1 @ model.W_V1))

    def fraction_right(candidates):
        right = 0
        for q in task.fixed.tolist():
            right += max(candidates, key=lambda other: E[q] @ W_K2 @ W_OV1 @ E[other]) == q
        return right / 20

    held = memory_birth.probes(model, task)
    assert held["wk2"] == pytest.approx(fraction_right(range(65)))
    assert held["wk2_triggers"] == pytest.approx(fraction_right(task.fixed.tolist()))
    assert 0 < held["wk2"] < held["wk2_triggers"] < 1
    assert "wk2_triggers" not in memory_birth.probes(model, BigramTask(k=20, seq_len=12, triggers="random"))


# ---- Training ---------------------------------------------------------------------------------------------------------

def runs_of(*flags):
    return common.sweep(memory_birth.parse_args([*TINY, *flags]), memory_birth.SWEEP, memory_birth.build, memory_birth.resolve)


def finished(*flags):
    """The runs of a command that has run, with their metrics and results."""
    runs = runs_of(*flags)
    for run in runs:
        run.results = run.read(edited=0)
    return runs


def trained(tmp_path, *flags):
    """The one run of a command: its settings, its model before and after, its results."""
    flags = [*flags, "--out-dir", tmp_path]
    run, = runs_of(*flags)
    common.seed_everything(run.args.seed)
    _, before = memory_birth.build(run.args)
    result, = call_main(*TINY, *flags)
    return run, before, memory_birth.load(result["folder"])[1], result


def test_frozen_stays_bit_identical_and_the_rest_moves(tmp_path):
    _, before, after, _ = trained(tmp_path, "--use-wf", "--loss", "all", "--steps", 6, "--freeze", "wo2:6+wf:3")
    assert set(after.state_dict()) == set(before.state_dict())
    for name, x in before.state_dict().items():
        assert torch.equal(x, after.state_dict()[name]) == (name not in ("W_K1", "W_K2", "W_F")), name


def test_the_full_model_trains_every_parameter(tmp_path):
    _, before, after, _ = trained(tmp_path, "--model", "full", "--n-layer", 1, "--steps", 3)
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        assert not torch.equal(p, q), name


def test_the_numbers_do_not_depend_on_how_often_they_are_evaluated(tmp_path):
    lines = [metrics_of(trained(tmp_path / every, "--steps", 6, "--eval-every", every)[0].folder) for every in ("3", "6")]
    assert lines[0][-1] == lines[1][-1] and [len(line) for line in lines] == [3, 2]


def test_results_are_measured_on_the_checkpoint(tmp_path):
    run, _, model, result = trained(tmp_path, "--steps", 20, "--lr", 2.0, "--outputs", "bigram", "--triggers", "random")
    last = metrics_of(run.folder)[-1]
    assert {key: result[key] for key in last if key != "step"} == {key: x for key, x in last.items() if key != "step"}
    for outputs in ("uniform", "bigram"):
        task = BigramTask(5, 16, "random", outputs, self_loops=False)
        assert result[f"accuracy_{outputs}"] == memory_birth.evaluate(model, task, n=1024)["accuracy"]


def test_attention_of_a_loaded_model(tmp_path):
    for model, heads in ("simple", 1), ("full", 4):
        run, _, _, result = trained(tmp_path, "--model", model, "--steps", 2)
        task, net = memory_birth.load(result["folder"])
        tokens, _ = task.sample(3, generator())
        logits, attns = net(tokens[:, :-1], return_attn=True)
        assert not net.training and logits.shape == (3, 16, 65) and [attn.shape for attn in attns] == [(3, heads, 16, 16)] * 2
        torch.testing.assert_close(attns[1].sum(-1), torch.ones(3, heads, 16))


THREE = ["--device", "cpu", "--preset", "three-steps"]
THREE_TINY = [*THREE, "--vocab-size", "20", "--seq-len", "24", "--n-embd", "108", "--batch-size", "32768"]


def test_each_of_three_steps_fills_its_own_memory_and_raises_the_accuracy():
    args = memory_birth.parse_args(THREE_TINY)
    start, first, second, third = memory_birth.three_steps(args, seed=0, case="theorem")
    assert start["wo2"] < 0.1 and start["wk2"] < 0.1 and start["wk1"] < 0.1
    assert first["wo2"] == second["wk2"] == 1 and third["wk1"] > 0.8
    assert first["wk2"] == start["wk2"] and second["wk1"] == start["wk1"]        # untouched by the steps before their own
    assert second["wo2"] == third["wo2"] == 1 and third["wk2"] == 1
    accuracy = [row["accuracy"] for row in (start, first, second, third)]
    assert all(later > earlier + 0.03 for earlier, later in itertools.pairwise(accuracy)) and accuracy[-1] > 0.27

    args.batch_size = 8192
    looped = memory_birth.three_steps(args, seed=0, case="self-loops")[-1]       # what breaks it, tested on the same sequences
    assert looped["wo2"] == looped["wk2"] == 1 and looped["accuracy"] < 0.05
    gaussian = memory_birth.three_steps(args, seed=0, case="gaussian")[-1]
    assert gaussian["wk2"] < 0.5 and gaussian["accuracy"] < third["accuracy"] - 0.1


def test_the_theorems_embeddings_are_orthonormal():
    torch.manual_seed(0)
    model = SimpleTransformer(10, 7, 50)
    memory_birth.theorem_init_(model, "orthonormal")
    W_OV1 = model.W_O1 @ model.W_V1
    rows = torch.cat([model.W_E, model.P, model.W_E @ W_OV1.mT, model.P @ W_OV1.mT, model.W_U])
    torch.testing.assert_close(rows @ rows.mT, torch.eye(44), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.W_V2 @ model.W_V2.mT, torch.eye(50), atol=1e-5, rtol=0)
    assert all((W == 0).all() for W in model.parameters())


def test_half_of_what_is_scored_are_self_loops():
    for self_loops, share in (True, 0.525), (False, 0.0):                        # 20 seeds: 0.525, standard deviation 0.008
        task = BigramTask(2, 32, "random", vocab_size=24, self_loops=self_loops)
        tokens, occurrence = task.sample(20_000, generator())
        scored = occurrence >= 2
        loops = (tokens[:, 1:] == tokens[:, :-1])[scored].float().mean().item()
        assert loops == pytest.approx(share, abs=0.04)


def test_every_layers_attention_of_each_setting_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(common, "plot_matrices", lambda path, panels, columns: drawn.update(panels))
    monkeypatch.setattr(common, "plot", lambda *rest, **settings: None)
    flags = ["--model", "full", "--n-layer", 3, 1, "--steps", 1, "--seed", 0, 1, "--plot", "--out-dir", tmp_path]
    results = call_main(*TINY, *flags)
    assert list(drawn) == ["n_layer 3, layer 1", "n_layer 3, layer 2", "n_layer 3, layer 3", "n_layer 1, layer 1"]
    task, model = memory_birth.load(results[0]["folder"])
    tokens, occurrence = task.sample(1, generator(1))
    z, trigger = tokens[0, :-1].tolist(), (occurrence[0] > 0).tolist()
    weights, rows, columns, _, later = drawn["n_layer 3, layer 2"]
    torch.testing.assert_close(weights, model(tokens[:, :-1], return_attn=True)[1][1][0].mean(0))
    assert len(columns) == 16 and rows == [name + "*" * hit for name, hit in zip(columns, trigger)]
    # in layer 1 from a trigger's successor to the trigger, then from a trigger to its earlier successors
    assert drawn["n_layer 3, layer 1"][-1] == [(t + 1, t) for t in range(15) if trigger[t]]
    assert later == [(t, s + 1) for t in range(16) for s in range(t) if trigger[t] and z[s] == z[t]] != []


def test_three_steps_print_the_theorem_beside_what_breaks_it(capsys):
    rows = memory_birth.main([*THREE, "--vocab-size", "8", "--seq-len", "8", "--n-embd", "40", "--batch-size", "512"])
    assert [(row["case"], row["step"]) for row in rows[:5]] == [
        ("theorem", "start"), ("theorem", "W_O2"), ("theorem", "W_K2"), ("theorem", "W_K1"), ("gaussian", "start")]
    out = capsys.readouterr().out.splitlines()
    for row in rows:
        line, = [words for words in map(str.split, out) if words[:5] == ["seed", "0,", f"{row['case']},", "after", row["step"]]]
        assert line[5:7] == [f"{row['accuracy']:.3f}", f"{row['wo2']:.3f}"]
    for line, four in zip(out[-3:], zip(*[iter(rows)] * 4)):
        rising = all(later["accuracy"] > earlier["accuracy"] for earlier, later in itertools.pairwise(four))
        assert line == f"Seed 0, {four[0]['case']}: the in-context accuracy {'rises' if rising else 'does not rise'} with every step."


# ---- The command ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, error", [
    ("--vocab-size 9 --text README.md", "--text has no effect"),
    ("--model full --n-embd 10", "n_embd 10 is not divisible by n_head 4"),
    ("--freeze none wo2", "--freeze wo2"),
    ("--freeze wf:3", "some of wk1 wk2 wo2, but not all"),                       # without --use-wf
    ("--use-wf --freeze wk1:5+wk2:5+wo2:5+wf:9", "some of wk1 wk2 wo2 wf, but not all"),
    ("--preset three-steps --n-embd 91 --vocab-size 20", "20 characters and 16 positions need --n-embd 92"),
    ("--preset three-steps --vocab-size 20 --seq-len 24 --n-embd 108 --batch-size 1 --seed 2", "has no direction"),
])
def test_what_cannot_be_is_one_line_and_writes_nothing(flags, error, tmp_path):
    flags = ["--device", "cpu", "--seq-len", 16, "--steps", 1, *flags.split()]
    assert error in refused(memory_birth.main, tmp_path, *flags)


def test_a_run_that_cannot_be_evaluated_does_not_end_the_sweep(tmp_path):
    flags = ["--vocab-size", "1000", "--n-triggers", "1", "--seq-len", "4", "--seed", "0", "1", "--out-dir", tmp_path]
    for result in call_main(*flags):
        assert "no trigger occurs twice" in result["failed"] and not Path(result["folder"]).exists()


def test_a_run_that_is_interrupted_in_its_first_step_has_the_same_metrics(tmp_path, monkeypatch):
    def interrupted(*rest, **settings):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call_main(*TINY, "--out-dir", tmp_path)
    result, = call_main(*TINY, "--out-dir", tmp_path)
    assert [line["step"] for line in metrics_of(result["folder"])] == list(range(0, 61, 10))


def test_the_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    call_main(*TINY, "--plot", "--steps", 10, "--freeze", "none", "wo2:5", "--seed", 0, 1, "--out-dir", tmp_path)
    call_main(*TINY, "--plot", "--steps", 10, "--model", "full", "--n-layer", 1, 2, "--out-dir", tmp_path)
    assert {path.name for path in (tmp_path / "memory_birth").glob("*.png")} == {"attention.png", "curves.png"}


def test_curves_are_the_metrics_under_their_names(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(common, "plot", lambda path, panels, columns: drawn.update(panels))
    flags = ["--steps", 20, "--freeze", "wo2:10", "--seq-len", 70, "--out-dir", tmp_path]
    call_main(*TINY, *flags)
    run, = finished(*flags)
    memory_birth.plot_curves([run])
    curves = {name.split(",")[0]: (title, x, y) for title, (_, found) in drawn.items() for name, x, y, _ in found}
    names = {"in-context accuracy": "accuracy", "W_O2: output": "wo2", "W_K2: key to look for": "wk2", "W_K1: previous token": "wk1_64"}
    for name, key in names.items():
        assert curves[name] == (": memories", [0, 10, 20], [line[key] for line in metrics_of(run.folder)])
    assert curves["in context"] == (": losses", [0, 10, 20], [line["loss_in_context"] for line in metrics_of(run.folder)])
    assert curves["W_O2 thaws"][1] == [10, 10]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_in_bfloat16_on_cuda(tmp_path):
    flags = ["--device", "cuda", "--compile", "--dtype", "bfloat16", "--freeze", "none", "wo2:30", "--out-dir", tmp_path]
    assert all("failed" not in result for result in call_main(*TINY, *flags))


# ---- The phenomenon ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("seed", [30, 31])
def test_each_memory_waits_for_the_one_above_it(tmp_path, seed):
    flags = ["--device", "cpu", "--out-dir", tmp_path, "--seed", seed, "--steps", 600]
    free, without_wo2, without_wk2 = call_main(*flags, "--freeze", "none", "wo2:300", "wk2:300")
    lines = [metrics_of(Path(result["folder"])) for result in (free, without_wo2, without_wk2)]
    free, without_wo2, without_wk2 = [{line["step"]: line for line in course} for course in lines]
    assert free[300]["wo2"] == free[300]["wk2"] == 1 and free[300]["wk1"] > 0.8 and free[300]["accuracy"] > 0.98
    frozen = without_wo2[300]
    assert max(frozen["wo2"], frozen["accuracy"]) < 0.1 and frozen["wk1"] < 0.2 and frozen["wk2"] < 0.5
    frozen = without_wk2[300]                                                    # W_O2 is learned without W_K2
    assert frozen["wo2"] > 0.85 and frozen["wk2"] < 0.3 and frozen["accuracy"] < 0.4
    assert frozen["wk1"] < free[300]["wk1"] - 0.15                               # at T = 32 W_K1 is slow, not still
    for course in without_wo2, without_wk2:
        assert course[600]["wo2"] > 0.95 and course[600]["wk2"] == 1 and course[600]["accuracy"] > 0.98


@pytest.mark.slow
def test_self_loops_teach_wk2_first(tmp_path):
    result, = call_main("--device", "cpu", "--out-dir", tmp_path, "--self-loops", "--seq-len", 64, "--lr", 0.2, "--steps", 100, "--seed", 1)
    lines = metrics_of(result["folder"])
    wk2, wo2, accuracy = [[line[key] >= 0.5 for line in lines].index(True) for key in ("wk2", "wo2", "accuracy")]
    assert wk2 < wo2 < accuracy


def test_a_step_goes_down_the_gradient_whatever_the_sign_of_its_mean_score(monkeypatch):
    args = memory_birth.parse_args([*THREE, "--batch-size", "64"])
    rows = []
    for sign in 1, -1:
        steps = [(name, lambda model: torch.full((9, 9), 0.01 * sign), 0, mean) for name, _, _, mean in memory_birth.STEPS]
        monkeypatch.setattr(memory_birth, "STEPS", steps)
        rows.append(memory_birth.three_steps(args, 0, "theorem"))
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_three_steps_in_the_theorems_setting():
    rows = memory_birth.three_steps(memory_birth.parse_args(THREE), 0, "theorem")
    accuracy = [row["accuracy"] for row in rows]
    assert accuracy == sorted(accuracy) and accuracy[-1] >= 0.55
    assert rows[-1]["wo2"] == rows[-1]["wk2"] == 1 and rows[-1]["wk1"] >= 0.85


@pytest.mark.slow
def test_two_layers_do_what_one_cannot(tmp_path):
    flags = ["--model", "full", "--n-layer", "1", "2", "--loss", "all", "--n-embd", "64", "--steps", "400"]
    one, two = call_main("--device", "cpu", "--out-dir", tmp_path, *flags)
    assert one["accuracy"] < 0.65 and two["accuracy"] > one["accuracy"] + 0.2


# ---- What is trained on, measured and shown, once more in plain code --------------------------------------------------

def test_a_batch_in_chunks_is_one_batch(tmp_path, monkeypatch):
    found = []
    for chunk in 4_096, 7:
        monkeypatch.setattr(memory_birth, "chunk_size", lambda task: chunk)
        _, _, model, result = trained(tmp_path / f"{chunk}", "--steps", 5, "--lr", 1.0)
        numbers = {key: value for key, value in result.items() if isinstance(value, float)}
        found.append((model.state_dict(), numbers))
    (whole, one), (in_chunks, many) = found
    assert many == pytest.approx(one, rel=1e-4)
    for name in whole:
        torch.testing.assert_close(in_chunks[name], whole[name])


def test_losses_are_means_over_the_positions_of_their_kind():
    task = BigramTask(seq_len=20)
    torch.manual_seed(0)
    model = SimpleTransformer(65, 20, 16)
    tokens, occurrence = task.sample(64, generator(10_000))
    losses = F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")
    found = memory_birth.evaluate(model, task, n=64)
    for name, at in ("all", occurrence >= 0), ("global", occurrence == 0), ("in_context", occurrence >= 2):
        assert found[f"loss_{name}"] == pytest.approx(losses[at].mean().item(), rel=1e-5)


def test_the_first_positions_alone_are_those_before_the_bound():
    task = BigramTask(k=5, seq_len=160)
    model = constructed(task, d=512)
    P = model.P.detach() / math.sqrt(512)
    model.W_K1.data = P[1:64].mT @ P[:63] - P[64:].mT @ P[63:-1]                 # right for t < 64, then wrong
    held = memory_birth.probes(model, task)
    assert held["wk1_64"] > 0.99 and held["wk1"] == pytest.approx(63 / 159, abs=0.02)


def test_attention_is_that_of_the_best_head():
    def two_heads(z, return_attn):
        own = torch.eye(12).expand(len(z), 1, -1, -1)
        attn = torch.cat([own, own.roll(1, 2)], 1)                               # at itself; at the previous token
        return torch.zeros(*z.shape, 65), [attn, attn]
    assert memory_birth.evaluate(two_heads, BigramTask(seq_len=12), n=20)["attn_prev"] == 1


@pytest.mark.parametrize("loss, least", [("all", 0), ("in-context", 2)])
def test_the_loss_of_the_flag_on_sequences_of_the_seed_is_what_moves_the_weights(tmp_path, loss, least):
    flags = ["--steps", 1, "--lr", 1e-3, "--weight-decay", 0.3, "--loss", loss, "--seed", 3]
    run, model, after, _ = trained(tmp_path, *flags)
    tokens, occurrence = memory_birth.build(run.args)[0].sample(32, generator(3))
    at = occurrence >= least
    F.cross_entropy(model(tokens[:, :-1])[at], tokens[:, 1:][at]).backward()
    gradient = model.W_O2.grad + 0.3 * model.W_O2
    torch.testing.assert_close(after.W_O2, model.W_O2 - 1e-3 * gradient)
    line = metrics_of(run.folder)[-1]
    assert line["loss"] == line["loss_" + loss.replace("-", "_")]


def test_the_full_model_has_the_weight_decay_of_adamw(tmp_path):
    flags = ["--model", "full", "--n-layer", 1, "--steps", 1, "--lr", 0.01, "--weight-decay"]
    _, before, decayed, _ = trained(tmp_path / "decayed", *flags, 0.3)
    _, _, plain, _ = trained(tmp_path / "plain", *flags, 0)
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(decayed.state_dict()[name], plain.state_dict()[name] - 0.003 * weight)


def shown(flags, capsys):
    """A command's one run, and its output in words, line by line."""
    call_main(*TINY, *flags)
    run, = finished(*flags)
    run.args.label = "simple model"
    return run, [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_tables_have_each_number_under_its_name(tmp_path, capsys):
    run, lines = shown(["--lr", 1, "--steps", 80, "--use-wf", "--out-dir", tmp_path], capsys)
    keys = "loss_global loss_in_context accuracy wo2 wo2_wf wk2 wk1_64 wf attn_prev attn_match".split()
    at = lines.index([key.removeprefix("loss_") for key in keys])
    for words, line in zip(lines[at + 1:], run.metrics):                         # nine evaluations: all of them
        assert words == [str(line["step"])] + [f"{line[key]:.3f}" for key in keys]
    at = lines.index("uniform outputs bigram outputs".split())
    assert lines[at + 1][2:] == [f"{run.results['accuracy_uniform']:.3f}", f"{run.results['accuracy_bigram']:.3f}"]
    firsts = "wo2 wo2_wf wk2 wk2_triggers wk1_64 accuracy".split()
    at = lines.index(firsts)
    for words, level in zip(lines[at + 1:], (0.5, 0.9)):
        steps = [next((str(line["step"]) for line in run.metrics if line[key] >= level), "-") for key in firsts]
        assert words == ["simple", "model,", f"{level}", *steps]


def test_the_verdict_is_what_the_metrics_say(tmp_path, capsys):
    run, lines = shown(["--freeze", "wo2:15", "--loss", "all", "--out-dir", tmp_path], capsys)
    said = memory_birth.verdict(run).splitlines()
    assert lines[-len(said):] == [line.split() for line in said]
    values = dict(step=[0, 10, 20, 30], loss_global=[4, 3, 2, 2], loss_in_context=[4, 4, 4, 2], wo2=[0, .5, .8, 1], wk2=[0, .4, .7, 1],
                  wk1_64=[0, .1, .2, 1], accuracy=[0, .1, .6, .99])
    run.metrics = [dict(zip(values, line)) for line in zip(*values.values())]
    run.results["accuracy"] = 0.99
    assert memory_birth.verdict(run) == (
        "simple model, seed 0:\n"
        "  loss_global has made half of its fall by step 10.\n"
        "  loss_in_context has made half of its fall by step 30.\n"
        "  Learned before the thaw at step 15: wo2.\n"
        "  When the accuracy passes one half, at step 20: wo2 0.80, wk2 0.70, wk1_64 0.20.\n"
        "  Least learned of these: wk1_64 (in the paper wk1).\n"
        "  The accuracy ends at 0.990.")
    run.args.use_wf = True                                                       # W_O2 as the model reads it
    for line in run.metrics:
        line["wo2_wf"] = line["wo2"] / 8
    assert "at step 20: wo2_wf 0.10, wk2 0.70, wk1_64 0.20.\n  Least learned of these: wo2_wf" in memory_birth.verdict(run)
    for line in run.metrics:
        line.update(wo2=0, accuracy=0.1, loss_global=math.nan)                   # nan: all characters are triggers
    assert "step 15: nothing.\n  No induction head" in memory_birth.verdict(run)
    assert "loss_global" not in memory_birth.verdict(run)
