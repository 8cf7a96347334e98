"""random_transformer.py: tasks against plain rules, models against NumPy, what is frozen, the probes, the download, the command."""
import argparse
import hashlib
import importlib
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import random_transformer
from random_transformer import TASKS, TRAINABLE, Recurrent, Transformer, answers, explained_variance, train_only
from test_common import generator, numpy_block, numpy_linear, numpy_mlp, numpy_norm, refused

SCRIPT = Path(random_transformer.__file__)
TINY = ["--device", "cpu", "--n-embd", "16", "--train", "embeddings", "--batch-size", "8", "--steps", "60",
        "--eval-every", "10"]
PARENS = [*TINY, "--task", "parens", "--size", "6"]


def sweep(args):
    return common.sweep(args, random_transformer.SWEEP, random_transformer.build, random_transformer.resolve)


def one_run(tmp_path, *flags):
    """A run of the sweep, ready to train; --task and --size are parens of 6 pairs where no task is given."""
    usual = TINY if "--task" in flags else PARENS
    args = random_transformer.parse_args([*usual, "--out-dir", str(tmp_path), *map(str, flags)])
    run, = sweep(args)
    common.seed_everything(0)
    return run


def train_and_measure(run):
    random_transformer.train(run.args, run)
    return random_transformer.measure(run.args, run)


@pytest.fixture
def short_lm(monkeypatch):
    """Windows of 64 words in place of 512, which take seconds."""
    monkeypatch.setattr(TASKS["lm"], "block_size", 64)
    random_transformer.make_task.cache_clear()
    yield
    random_transformer.make_task.cache_clear()


# ---- The tasks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["modadd", "needle", "addition", "parens", "memorize", "imitate"])
def test_samples_fit_the_model_and_depend_on_the_generator_alone(name):
    task = TASKS[name]()
    tokens, scored = task.sample(2_000, generator())
    assert tokens.shape == scored.shape and tokens.dtype == torch.int64 and scored.dtype == torch.bool
    assert 0 <= tokens.min() and tokens.max() < task.vocab_size and tokens.shape[1] - 1 <= task.block_size
    assert 1 <= scored.sum(1).min() and scored.sum(1).max() <= dict(addition=12).get(name, 1) and not scored[:, 0].any()
    again, other = task.sample(2_000, generator())[0], task.sample(2_000, generator(1))[0]
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)
    small = 8 if name == "parens" else task.sizes[-1] // 2 * 2                   # (30 pairs take seconds)
    assert torch.equal(TASKS[name](small).test_set[0], TASKS[name](small).test_set[0])


def test_modadd_adds_and_holds_out_a_fixed_twentieth():
    task = TASKS["modadd"](23)
    tokens, scored = task.sample(20_000, generator())
    assert all(c == (a + b) % 23 for a, b, c in tokens.tolist()) and scored.float().mean(0).tolist() == [0, 0, 1]
    seen, held_out = {(a, b) for a, b, _ in tokens.tolist()}, {(a, b) for a, b, _ in task.test_set[0].tolist()}
    assert len(held_out) == 23**2 // 20 and len(seen) == 23**2 - len(held_out) and not seen & held_out


def test_needle_is_associative_recall():
    tokens, scored = TASKS["needle"]().sample(5_000, generator())
    lengths, asked = Counter(), Counter()
    for row, answer in zip(tokens.tolist(), scored.tolist()):
        end = answer.index(True)
        k, markers, values = (end - 1) // 2, row[0:end - 1:2], row[1:end - 1:2]
        assert sum(answer) == 1 and end == 2 * k + 1 and not any(row[end + 1:])
        assert len(set(markers)) == k and all(128 <= m <= 157 for m in markers) and all(1 <= v <= 127 for v in values)
        assert row[end] == dict(zip(markers, values))[row[end - 1] - 30]
        lengths[k] += 1
        asked[markers.index(row[end - 1] - 30) / k >= 0.5] += 1
    assert set(lengths) == set(range(1, 31)) and max(abs(n - 5_000 / 30) for n in lengths.values()) < 5 * math.sqrt(5_000 / 30)
    assert 0.4 < asked[True] / 5_000 < 0.5                                       # the first of one pair is below 0.5


@pytest.mark.parametrize("n", [1, 3, 10])
def test_addition_adds(n):
    tokens, scored = TASKS["addition"](n).sample(5_000, generator())
    leading = Counter()
    for row, answer in zip(tokens.tolist(), scored.tolist()):
        a, b, out = row[:n], row[n + 1:2 * n + 1], row[2 * n + 2:]
        assert row[n] == 10 and row[2 * n + 1] == 11 and a[-1] and b[-1]         # no leading zeros
        total = str(int("".join(map(str, a[::-1]))) + int("".join(map(str, b[::-1]))))
        expected = [20 + int(digit) for digit in total[::-1]] + [30]
        assert out == expected + [12] * (n + 2 - len(expected))
        assert answer == [False] * (2 * n + 2) + [True] * len(expected) + [False] * (n + 2 - len(expected))
        leading[a[-1]] += 1
    assert max(abs(leading[digit] - 5_000 / 9) for digit in range(1, 10)) < 5 * math.sqrt(5_000 / 9)


def plain_balanced(t, rng):
    if t == 1:
        return "()"
    if rng.random() < 0.5:
        return "(" + plain_balanced(t - 1, rng) + ")"
    u = rng.randint(1, t - 1)
    return plain_balanced(u, rng) + plain_balanced(t - u, rng)


def is_balanced(text):
    depth = 0
    for bracket in text:
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def plain_parens(max_pairs, rng):
    """The generator of the paper, one string at a time."""
    if is_random := rng.random() < 1 / 3:
        text = [rng.choice("()") for _ in range(rng.randint(1, 2 * max_pairs))]
    else:
        text = list(plain_balanced(rng.randint(1, max_pairs), rng))
    m = rng.randint(0, 3)
    if not is_random and rng.random() < 0.5:
        m = 0

    def geometric(n):
        while rng.random() < 0.5:
            n += 1
        return n
    if m & 1:
        for _ in range(geometric(1)):
            i, j = rng.randrange(len(text)), rng.randrange(len(text))
            if i < j:
                text[i], text[j] = text[j], text[i]
    if m & 2:
        for _ in range(geometric(1) * (2 if rng.random() < 2 / 3 else 1)):
            i = rng.randrange(len(text))
            text[i] = "()"[text[i] == "("]
    return "".join(text)


def decoded(tokens, scored):
    """Parens as strings, with their labels; checks the layout."""
    for row, answer in zip(tokens.tolist(), scored.tolist()):
        end = row.index(3)
        assert set(row[:end]) <= {1, 2} and answer.index(True) == end + 1 and sum(answer) == 1 and not any(row[end + 2:])
        yield "".join(" ()"[token] for token in row[:end]), row[end + 1]


def test_random_balanced_strings_have_the_recursions_distribution():
    def exact(t):
        if t == 1:
            return {"()": 1.0}
        total = Counter()
        for inner, p in exact(t - 1).items():
            total[f"({inner})"] += p / 2
        for u in range(1, t):
            for left, p in exact(u).items():
                for right, q in exact(t - u).items():
                    total[left + right] += p * q / 2 / (t - 1)
        return total
    n = 40_000
    for t in (1, 2, 3, 4, 5):
        is_close = TASKS["parens"](7).balanced(torch.full((n,), t), generator(t))
        assert not is_close[:, 2 * t:].any()
        counts = Counter("".join("()"[c] for c in row[:2 * t]) for row in is_close.long().tolist())
        expected = exact(t)
        assert set(counts) == set(expected)
        assert all(abs(counts[s] - n * p) < 5 * math.sqrt(n * p) for s, p in expected.items())


def test_parens_has_the_plain_generators_distribution(monkeypatch):
    monkeypatch.setattr(TASKS["parens"], "sizes", range(1, 40))
    rng, n = random.Random(0), 40_000
    plain = Counter(plain_parens(2, rng) for _ in range(n))                      # 30 strings: the whole distribution
    ours = Counter(text for text, _ in decoded(*TASKS["parens"](2).sample(n, generator())))
    assert set(ours) == set(plain)
    assert all(abs(ours[s] - plain[s]) < 5 * math.sqrt(ours[s] + plain[s]) for s in plain)

    ours = list(decoded(*TASKS["parens"]().sample(n, generator())))
    assert all((label == 2) == is_balanced(text) for text, label in ours)
    assert abs(np.mean([label == 2 for _, label in ours]) - 0.525) < 0.01        # the published share and length
    assert abs(np.mean([len(text) for text, _ in ours]) - 30.8) < 0.4
    surplus = lambda texts: Counter(abs(text.count("(") - text.count(")")) for text in texts)
    ours, plain = surplus(text for text, _ in ours), surplus(plain_parens(30, rng) for _ in range(n))
    assert all(abs(ours[i] - plain[i]) < 5 * math.sqrt(ours[i] + plain[i]) for i in range(12))           # flips
    assert ours[2] > 300 and ours[4] > 300


def test_swaps_go_from_left_to_right():
    n, half, rng = 40_000, 15, random.Random(0)
    sorted_strings = (torch.arange(2 * half) >= half).expand(n, -1)              # 15 opening ones, then 15 closing ones
    swapped = TASKS["parens"]().swap(sorted_strings, torch.full((n, 1), 2 * half), generator())
    ours = Counter((swapped[:, :half].sum(1)).tolist())                          # closing ones that came to the front

    plain = Counter()
    for _ in range(n):
        text, more = [0] * half + [1] * half, True
        while more:
            i, j = rng.randrange(2 * half), rng.randrange(2 * half)
            if i < j:
                text[i], text[j] = text[j], text[i]
            more = rng.random() < 0.5
        plain[sum(text[:half])] += 1
    assert abs(ours[0] / n - 0.6) < 0.02                                         # sum of (3/4)^n / 2^n, and swaps back
    assert all(abs(ours[i] - plain[i]) < 5 * math.sqrt(ours[i] + plain[i]) for i in range(5))
    # With a single closing bracket, at the end, no swap moves it but those that name the last position second
    one = torch.arange(30).eq(29).expand(n, -1)
    kept = TASKS["parens"]().swap(one, torch.full((n, 1), 30), generator())[:, 29].float().mean()
    moves = 29 / 900                                                             # of a try
    assert abs(kept - sum((1 - moves)**k / 2**k for k in range(1, 30))) < 0.005


@pytest.mark.parametrize("name, size", [("needle", 1), ("needle", 4), ("addition", 3), ("parens", 5), ("parens", 10)])
def test_a_twentieth_of_all_sequences_is_for_the_test_alone(name, size):
    task = TASKS[name](size)
    assert len(task.test_set[0]) == 4_000
    tested = {tuple(row) for row in task.test_set[0].tolist()}
    tokens, scored = task.sample(100_000, generator(1))
    held_out = task.held_out(tokens)
    learned, kept = {tuple(row) for row in tokens[~held_out].tolist()}, {tuple(row) for row in tokens[held_out].tolist()}
    assert not learned & tested and kept & tested
    if name == "parens":                                                         # those of 9 brackets and more
        drawn = [(row, answer) for row, answer in decoded(tokens, scored)]
        assert all(len(text) > 8 for text, _ in decoded(*task.test_set))
        distinct, of_all = {text for text, _ in drawn if len(text) > 8}, np.mean([label == 2 for _, label in drawn])
        labels = [label == 2 for _, label in decoded(*task.test_set)]
        assert size < 10 or abs(np.mean(labels) - of_all) < 0.1
    else:
        distinct = learned | kept
    assert abs(len(kept) - len(distinct) / 20) < 5 * math.sqrt(len(distinct) / 20)


def test_a_task_with_nothing_held_out_says_so():
    class Same(random_transformer.HashedTask):
        """Always the same sequence."""
        sizes = range(1, 2)

        def sample(self, batch, generator):
            return self.scored_from(torch.ones(batch, 3, dtype=torch.long), 2)

    with pytest.raises(common.RunError, match="no sequence is held out"):
        Same(1).test_set


@pytest.mark.parametrize("name", ["needle", "parens", "modadd"])
def test_training_learns_nothing_from_the_test_set(tmp_path, monkeypatch, name):
    """Every answer that enters the loss belongs to a sequence that the test set does not have."""
    run = one_run(tmp_path, "--task", name, "--size", "6", "--steps", "30", "--batch-size", "500")
    task, learned = random_transformer.build(run.args)[0], set()
    tested = {tuple(row) for row in task.test_set[0].tolist()}
    losses = TASKS[name].losses

    def watched_losses(self, logits, targets, tokens):
        if torch.is_grad_enabled():
            learned.update(tuple(row) for row in tokens[(targets >= 0).any(1)].tolist())
        return losses(self, logits, targets, tokens)
    monkeypatch.setattr(TASKS[name], "losses", watched_losses)
    random_transformer.train(run.args, run)
    assert len(learned) > (30 if name == "modadd" else 1_000) and not learned & tested
    drawn = {tuple(row) for row in task.sample(5_000, generator())[0].tolist()}
    assert bool(drawn & tested) == (name != "modadd")                            # they are drawn, and left out


def test_chance_is_what_a_trivial_answer_makes():
    labels = list(decoded(*TASKS["parens"](10).test_set))
    even = np.mean([(len(text) % 2 == 0) == (label == 2) for text, label in labels])
    assert TASKS["parens"](10).chance == pytest.approx(even) == pytest.approx(0.683, abs=0.001)

    for size, expected in [(4, 0.525), (30, 0.162)]:                             # a random value of 30 makes 0.140
        right = []
        for row, answer in zip(*[x.tolist() for x in TASKS["needle"](size).test_set]):
            end = answer.index(True)
            values = Counter(row[1:end - 1:2])
            most = [value for value, n in values.items() if n == max(values.values())]
            right.append((row[end] in most) / len(most))
        assert TASKS["needle"](size).chance == pytest.approx(np.mean(right)) == pytest.approx(expected, abs=0.001)

    for size, expected in [(3, 0.336), (10, 0.198)]:
        counts = {}
        for row, answer in zip(*[x.tolist() for x in TASKS["addition"](size).test_set]):
            for position in np.flatnonzero(answer):
                counts.setdefault(position, Counter())[row[position]] += 1
        total = sum(sum(count.values()) for count in counts.values())
        best = sum(max(count.values()) for count in counts.values()) / total
        assert TASKS["addition"](size).chance == pytest.approx(best) == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("first, last, expected", [(22, None, 0.212), (23, 33, 0.250)])
def test_the_two_scores_of_addition_do_not_compare(first, last, expected):
    """The best guess from the position and the token before it: of the paper's text, of its released code's eleven positions."""
    counts = {}
    for row in TASKS["addition"]().sample(100_000, generator())[0].tolist():
        row = [*row, 12]
        for position in range(first, (last or row.index(30)) + 1):       # to the stop, or to a fixed position
            counts.setdefault((position, row[position - 1]), Counter())[row[position]] += 1
    best = sum(max(count.values()) for count in counts.values())
    assert best / sum(sum(count.values()) for count in counts.values()) == pytest.approx(expected, abs=0.003)


def test_memorize_is_one_fixed_table():
    task = TASKS["memorize"](16)
    table = {(x, y): z for x, y, z in task.test_set[0].tolist()}
    assert set(table) == {(x, 16 + y) for x in range(16) for y in range(16)} and set(table.values()) <= set(range(16))
    assert all(table[x, y] == z for x, y, z in task.sample(3_000, generator())[0].tolist())
    assert len(set(table.values())) > 12 and torch.equal(TASKS["memorize"](16).test_set[0], task.test_set[0])
    first_part = task.test_set[0][:64]
    assert len(set(first_part[:, 0].tolist())) > 12                              # shuffled: scores of a part are of all x


# What the recipe of the paper's text gives: means over inputs of the entropy of a target's output and of the KL between two
# of them, for the one target of each width. Published: entropies of 2.89 to 3.02 and KLs of 0.8 to 3.3 over all widths.
@pytest.mark.parametrize("width", [4, 32, 128])
def test_imitations_targets(width):
    task = TASKS["imitate"](width)
    weights = task.target.state_dict()
    assert len(task.target.h) == 3 and task.target.h[0].attn.n_head == 2
    assert weights["lm_head.weight"].std() == pytest.approx(2 / math.sqrt(width), rel=0.1)
    assert weights["h.1.attn.c_attn.weight"].std() == pytest.approx(0.2, rel=0.2)
    assert weights["h.1.mlp.c_proj.weight"].std() == pytest.approx(20 * 0.02 / math.sqrt(6), rel=0.2)
    tokens, scored = task.sample(300, generator())
    log_p = task.target(tokens[:, :-1])[:, -1].log_softmax(-1).detach()          # (B, V)
    torch.testing.assert_close(task.log_probs(tokens)[:, 0], log_p)
    logits = torch.randn(300, 1, 512)
    q = logits[:, 0].softmax(-1)
    torch.testing.assert_close(task.losses(logits, None, tokens)[:, 0], (log_p.exp() * (log_p - q.log())).sum(1))
    assert task.losses(log_p[:, None], None, tokens).abs().max() < 1e-5
    entropy, kl = task.describe()
    # Logits of standard deviation 2 over 512 tokens have an entropy of about ln 512 - 2 = 4.2 nats
    assert 4.1 < entropy < 4.9 and 0.6 < kl < 3.5


def test_lm_reads_words_and_keeps_the_end_for_the_test(tmp_path):
    words = ["the", "cat", "isn't", "here", ".", "once"]
    rng = random.Random(0)
    text = rng.choices(words[:5], weights=[5, 4, 3, 2, 1], k=19_000) + ["once"] + rng.choices(["the", "cat"], k=1_000)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(text[i:i + 10]) for i in range(0, len(text), 10)))
    task = TASKS["lm"](6, text=str(path))
    assert task.words[0] == "<unknown>" and set(task.words[1:]) == set(words[:5]) and len(task.train_ids) == 19_000
    tokens, scored = task.sample(50, generator())
    assert tokens.shape == (50, 513) and not scored[:, 0].any() and scored[:, 1:].all() and task.n_answers == 512
    whole = " ".join(text)
    for row in tokens[:5].tolist():
        assert " ".join(task.words[i] for i in row) in whole
    assert set(task.test_set[0].unique().tolist()) <= {task.words.index("the"), task.words.index("cat"), 0}
    assert int((task.train_ids == 0).sum() + (task.test_ids == 0).sum()) == 1    # "once" is the sixth word
    assert TASKS["lm"](50, text=str(path)).vocab_size == 7                       # no more ids than words, and the unknown


def test_of_tinystories_the_validation_split_is_the_test(tmp_path, monkeypatch):
    texts = dict(train="one two three . " * 300, valid="two four one . " * 300)
    for split, text in texts.items():
        (tmp_path / split).write_text(text)
    monkeypatch.setattr(random_transformer, "tinystories", lambda split: tmp_path / split)
    task = TASKS["lm"](10)
    assert set(task.words) == {"<unknown>", "one", "two", "three", "."}          # the training text alone
    assert len(task.train_ids) == len(task.test_ids) == 1_200
    of = lambda ids: [task.words[i] for i in ids[:4].tolist()]
    assert of(task.train_ids) == ["one", "two", "three", "."] and of(task.test_ids) == ["two", "<unknown>", "one", "."]


# ---- The models and what is trained -----------------------------------------------------------------------------------

def numpy_linear_block(block, x):
    """As numpy_block, with attention replaced by the sum of the values so far."""
    values = numpy_linear(numpy_norm(x, block.ln_1), block.attn.c_attn)
    so_far = np.array([sum(values[s] for s in range(t + 1)) for t in range(len(x))])
    x = x + numpy_linear(so_far, block.attn.c_proj)
    return x + numpy_mlp(numpy_norm(x, block.ln_2), block.mlp), None


@pytest.mark.parametrize("linear", [False, True])
def test_the_transformer_agrees_with_numpy(linear):
    torch.manual_seed(0)
    model = Transformer(20, 9, 3, 2, 12, linear).double()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    tokens = torch.randint(20, (2, 9))
    logits, states = model(tokens), model.hidden_states(tokens)
    attns = None if linear else model.attention(tokens)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for b in range(2):
        x = w["wte.weight"][tokens[b]] + w["wpe.weight"]
        np.testing.assert_allclose(states[0][b].detach(), x)
        for i, block in enumerate(model.h):
            x, weights = (numpy_linear_block if linear else numpy_block)(block, x)
            np.testing.assert_allclose(states[i + 1][b].detach(), x, atol=1e-10)
            assert linear or np.abs(attns[i][b].detach().numpy() - weights).max() < 1e-10
        np.testing.assert_allclose(logits[b].detach(), numpy_norm(x, model.ln_f) @ w["lm_head.weight"].T, atol=1e-10)
    at = torch.tensor([[8, 0, 3], [1, 1, 7]])                                    # there alone
    torch.testing.assert_close(model(tokens, at), logits.gather(1, at[..., None].expand(-1, -1, 20)))
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5])             # causal


@pytest.mark.parametrize("flags, init", [([], "gpt2"), (["--init", "paper"], "paper"), (["--preset", "paper"], "paper")])
def test_initial_weights_have_the_stated_standard_deviations(tmp_path, flags, init):
    command = ["--task", "imitate", "--n-embd", "256", "--n-layer", "3", "--target-width", "4", *flags]
    _, model = random_transformer.build(one_run(tmp_path, *command).args)
    attn, c_fc, mlp = {"gpt2": (0.02 / 6**0.5, 0.02, 0.02 / 6**0.5), "paper": (0.02, 0.01, 0.01)}[init]
    expected = {"attn.c_proj": attn, "mlp.c_fc": c_fc, "mlp.c_proj": mlp}        # all others 0.02
    for name, weights in model.named_parameters():
        if weights.dim() == 2:
            std = next((std for part, std in expected.items() if part in name), 0.02)
            assert weights.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(weights.mean().item()) < 0.001
        elif "bias" in name:
            assert not weights.any(), name


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_recurrent_models_predict_where_they_are_asked(kind):
    model, tokens, at = Recurrent(11, kind, 8), torch.randint(11, (3, 7)), torch.tensor([[6], [2], [0]])
    logits = model(tokens)
    assert logits.shape == (3, 7, 11)
    torch.testing.assert_close(model(tokens, at)[:, 0], logits[range(3), at[:, 0]])
    assert model.rnn.num_layers == 2
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    h = model.rnn(model.wte(tokens))[0][1, 2].detach().numpy()
    expected = weights["lm_head.weight"] @ h + weights["lm_head.bias"]           # the decoder has a bias
    assert np.abs(weights["lm_head.bias"]).max() > 0
    np.testing.assert_allclose(logits[1, 2].detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name, rate, n_layer", [("lm", 0.1, 4), ("parens", 0.0, 2)])
def test_dropout_and_weight_decay_are_the_released_codes(tmp_path, monkeypatch, short_lm, name, rate, n_layer):
    """Dropout in lm's training alone; no weight decay on biases and norms."""
    text, rates, dropout = tmp_path / "text.txt", {}, F.dropout
    text.write_text("one two three. " * 3_000)

    def watched(x, p=0.5, training=True, inplace=False):
        rates.setdefault(torch.is_grad_enabled(), []).append(p * training)
        return dropout(x, p, training, inplace)
    monkeypatch.setattr(F, "dropout", watched)
    own = ["--text", text] if name == "lm" else []
    run = one_run(tmp_path, "--task", name, "--train", "full", "--steps", "1", "--weight-decay", "0.1", "--size", "6", *own)
    train_and_measure(run)
    assert set(rates[True]) == {rate} and set(rates[False]) == {0.0}
    assert len(rates[True]) == 1 + 2 * n_layer               # the embeddings, and in each layer what attention and MLP write
    groups = run.optimizer.param_groups
    assert {p.dim(): group["weight_decay"] for group in groups for p in group["params"]} == {2: 0.1, 1: 0.0}
    assert sum(len(group["params"]) for group in groups) == 3 + 12 * n_layer + 2


def test_parameter_counts(tmp_path, monkeypatch, capsys):
    for vocab_size, block_size, n_layer, d in [(199, 5, 2, 32), (31, 40, 3, 16)]:
        model = Transformer(vocab_size, block_size, n_layer, 4, d)
        layers = n_layer * (12 * d**2 + 13 * d)
        assert sum(p.numel() for p in model.parameters()) == (2 * vocab_size + block_size) * d + layers + 2 * d
    count = lambda which: sum(p.numel() for p in train_only(Transformer(1024, 5, 2, 4, 128), which))
    assert (count("full"), count("embeddings")) == (659_584, 262_784)            # Table 3
    assert count("unembed") == 1024 * 128 and count("embed") == 1029 * 128 and count("token_unembed") == 2048 * 128
    assert Transformer(97, 5, 1, 4, 1024).wte.weight.numel() == 99_328           # Table 6 has modadd at p = 97
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "parens", "--train", "embeddings", "--n-embd", "16", "--preset", "params"]
    found, = random_transformer.main(flags)
    header, row = capsys.readouterr().out.splitlines()[2:4]
    assert header.split() == ["wte", "wpe", "h", "ln_f", "lm_head", "all", "trained"]
    assert row.split()[4:] == ["64", "1,280", "6,560", "32", "64", "8,000", "1,408"]
    assert (found["wpe"], found["trained"]) == (1_280, 1_408) and not list(tmp_path.iterdir())           # nothing is trained


@pytest.mark.parametrize("model", ["transformer", "linear", "lstm", "rnn"])
@pytest.mark.parametrize("which", TRAINABLE)
def test_frozen_stays_and_trained_moves(tmp_path, model, which):
    run = one_run(tmp_path, "--model", model, "--train", which, "--steps", "3")
    before = random_transformer.build(run.args)[1].state_dict()
    common.seed_everything(0)
    result = train_and_measure(run)
    after = torch.load(run.folder / "ckpt.pt", weights_only=True)["model"]
    parts = dict(full=["wte", "wpe", "h", "ln_f", "rnn", "lm_head"], embeddings=["wte", "wpe", "lm_head"], unembed=["lm_head"],
                 embed=["wte", "wpe"], token_unembed=["wte", "lm_head"])[which]
    for name in before:
        assert torch.equal(before[name], after[name]) != (name.split(".")[0] in parts), name
    assert result["n_trained"] == sum(p.numel() for name, p in before.items() if name.split(".")[0] in parts)


def test_answers_are_found_where_they_are_predicted():
    tokens, scored = TASKS["addition"](2).sample(200, generator())               # 3 or 4 answers
    at, targets = answers(tokens, scored, 4)
    for row, answer, a, t in zip(tokens.tolist(), scored.tolist(), at.tolist(), targets.tolist()):
        where = [i for i, s in enumerate(answer) if s]
        assert [i + 1 for i, x in zip(a, t) if x != -100] == where and [x for x in t if x != -100] == [row[i] for i in where]
    assert (targets == -100).any() and (targets[:, 3] != -100).any()


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path, monkeypatch):
    rates, step, peak = [], torch.optim.AdamW.step, 7e-3
    run = one_run(tmp_path, "--model", "lstm", "--steps", "40", "--warmup", "10", "--lr", peak)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(float(self.param_groups[0]["lr"])), step(self))[1])
    random_transformer.train(run.args, run)
    assert rates[0] == pytest.approx(peak / 10) and rates[9:11] == pytest.approx([peak, peak])
    assert rates[25] == pytest.approx(peak / 2) and rates[-1] == pytest.approx(peak * (1 - math.cos(math.pi / 30)) / 2)


# ---- Measurement ------------------------------------------------------------------------------------------------------

def test_explained_variance_of_a_known_spectrum():
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=generator()).double())[0]
    data = torch.randn(500, 30, generator=generator(1)).double()
    data = torch.linalg.qr(data - data.mean(0))[0]                               # centred, orthonormal columns
    spectrum = torch.arange(30, 0, -1).double()
    hidden = data * spectrum.sqrt()
    share = (spectrum[:10].sum() / spectrum.sum()).item()
    assert explained_variance(hidden + 5) == pytest.approx((share, share), abs=1e-6)       # neurons are the components
    principal, neuron = explained_variance(hidden @ rotation + 5)
    assert principal == pytest.approx(share, abs=1e-6) and neuron < 0.9 * share
    assert explained_variance(hidden, top=3)[0] == pytest.approx((30 + 29 + 28) / 465, abs=1e-6)


def test_evaluate_counts_each_answer_once():
    task = TASKS["addition"](2)

    class Fixed(nn.Module):
        """Gives every token the same logits: the stop 5, all others 0."""
        def forward(self, tokens, at):
            return 5.0 * F.one_hot(torch.full_like(at, 30), 31).float()
    tokens, scored = task.sample(1_500, generator())                             # more than one batch of the evaluation
    answer = tokens[scored]
    log_p = np.where(answer == 30, 5, 0) - math.log(30 + math.exp(5))
    found = random_transformer.evaluate(Fixed(), task, tokens, scored)
    assert found["loss"] == pytest.approx(-log_p.mean(), abs=1e-6)
    assert found["accuracy"] == pytest.approx(np.mean((answer == 30).numpy()), abs=1e-9)


@pytest.mark.parametrize("p", [23, 73])                                          # 73: more pairs than go at once
def test_circuit_tells_a_pizza_from_a_clock(p):
    task = TASKS["modadd"](p)
    angle = 2 * math.pi * torch.arange(p) / p

    class Fake(nn.Module):
        """Numbers on a circle. The pizza adds a's and b's points, the clock adds their angles by a product."""
        def __init__(self, combine):
            super().__init__()
            self.wte = nn.Embedding.from_pretrained(torch.stack([angle.cos(), angle.sin()], 1))
            self.combine, self.ln_f = combine, nn.Identity()
            self.lm_head = lambda z: z[..., :1] * angle.cos() + z[..., 1:] * angle.sin()

        def hidden_states(self, tokens):
            x = self.wte(tokens).requires_grad_()
            return [x, self.combine(x[:, 0], x[:, 1])[:, None]]

        def forward(self, tokens):
            return self.lm_head(self.hidden_states(tokens)[-1])

    def pizza(a, b):
        s = a + b                                                                # angle (a + b) / 2, length |cos((a - b) / 2)|
        return torch.stack([s[:, 0]**2 - s[:, 1]**2, 2 * s[:, 0] * s[:, 1]], 1) / s.norm(dim=1, keepdim=True)

    def clock(a, b):
        return torch.stack([a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0]], 1) * (2 + a[:, :1])
    symmetricity, irrelevance = random_transformer.circuit(Fake(pizza), task)
    assert symmetricity == pytest.approx(1, abs=1e-4) and irrelevance == pytest.approx(0, abs=1e-3)
    symmetricity, irrelevance = random_transformer.circuit(Fake(clock), task)
    assert symmetricity < 0.6 and irrelevance == pytest.approx(1, abs=0.02)


# ---- The download -----------------------------------------------------------------------------------------------------

def test_tinystories_is_downloaded_whole_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(random_transformer, "TINYSTORIES", f"file://{tmp_path}/{{}}-{{}}.txt")
    pointer, file = tmp_path / "raw-valid.txt", tmp_path / "resolve-valid.txt"
    content = b"Once upon a time. " * 200_000
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(content).hexdigest()}\n")
    for wrong in content[:1_500_000], bytes(len(content)):                       # broken off; another file
        file.write_bytes(wrong)
        with pytest.raises(OSError, match="invalid hash value"):
            random_transformer.tinystories("valid")
        assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    file.write_bytes(content)
    path = random_transformer.tinystories("valid")
    assert path == tmp_path / "home/.cache/nanotheory/TinyStories-valid.txt" and path.read_bytes() == content
    file.unlink()
    assert random_transformer.tinystories("valid") == path                       # the second time nothing is downloaded


# ---- The command ------------------------------------------------------------------------------------------------------

def test_an_edited_text_is_read_again_in_the_same_session(tmp_path):
    text = tmp_path / "text.txt"
    n_words = []
    for words in ("one two three. ", "one two three four. "):
        text.write_text(words * 3_000)
        result, = random_transformer.main([*TINY, "--steps", "1", "--task", "lm", "--text", text, "--out-dir", tmp_path / words[-6:-2]])
        task, _ = random_transformer.load(result["folder"])
        n_words.append(len(task.words))
    assert n_words[1] == n_words[0] + 1


def test_every_task_and_model_trains_and_every_figure_is_drawn(tmp_path, capsys, short_lm):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("one two three. " * 3_000)
    flags = [*TINY, "--steps", "2", "--task", *TASKS, "--size", "5", "--text", text, "--out-dir", tmp_path / "out", "--plot"]
    results = random_transformer.main(flags)
    out = capsys.readouterr().out
    assert len(results) == len(TASKS)
    for wanted in ("imitate 16", "Prose", "query to value", "symmetricity", "entropy"):
        assert wanted in out, wanted
    out = re.sub("figure: .*\n", "", out[out.index("\nAccuracy"):])
    assert max(map(len, out.splitlines())) <= 100
    figures = {(path.parent.name.split(",")[1], path.name) for path in (tmp_path / "out" / "random_transformer").glob("*/*.png")}
    assert figures == {("task=needle", "attention.png"), ("task=modadd", "circle.png")}
    assert (tmp_path / "out" / "random_transformer" / "width.png").exists()
    for found in results:
        assert 0 < found["loss"] < 20 and len(found["neurons"]) >= 3
        if found["settings"]["task"] == "imitate":
            assert "accuracy" not in found                                       # no token is the right one
        else:
            assert 0 <= found["accuracy"] <= 1
    random_transformer.main(flags[:-1])                                          # all finished: the table alone
    assert capsys.readouterr().out == out


def fake_runs(monkeypatch, score):
    """In place of training: the accuracy of each run is score(args)."""
    def complete(runs, train, measure, show):
        for run in runs:
            run.results = dict(accuracy=score(run.args), loss=1.0, n_trained=1, trivial=0.25, components=[0.5])
        show(runs)
        return runs
    monkeypatch.setattr(common, "complete", complete)


def test_the_verdict_is_what_the_runs_show(tmp_path, monkeypatch, capsys):
    scores = {("parens", 16): 0.7, ("parens", 128): 0.96, ("needle", 16): 0.1, ("needle", 128): 0.2}
    fake_runs(monkeypatch, lambda args: scores[args.task, args.n_embd] if args.train == "embeddings" else 1.0)
    flags = ["--task", "parens", "needle", "--device", "cpu", "--out-dir", str(tmp_path)]
    for preset in "quick", "paper":
        random_transformer.main([*flags, "--preset", preset, "--n-embd", "16", "128"])
        out = capsys.readouterr().out
        assert ("principal components" in out) == (preset == "paper")
        assert out.splitlines()[-5:-1] == ["  random, width 16: nothing", "  random, width 128: parens",
            "  fully trained, width 16: needle, parens", "  fully trained, width 128: needle, parens"]
        assert out.splitlines()[-1].endswith("but not by the narrowest: parens")
    random_transformer.main([*flags, "--n-embd", "16"])
    assert "narrowest" not in capsys.readouterr().out                            # there is one width


def test_table_1_has_the_papers_columns_and_numbers(tmp_path, monkeypatch, capsys):
    fake_runs(monkeypatch, lambda args: 0.5)
    monkeypatch.setattr(random_transformer, "build", lambda args: None)          # takes seconds
    flags = ["--preset", "table1", "--device", "cpu", "--seed", "0", "1", "--out-dir", tmp_path]
    asked = random_transformer.main([*flags])
    assert len(asked) == len({run.folder for run in asked}) == 4 * 5 * 2
    modadd = next(run.args for run in asked if run.args.task == "modadd")
    n_batches = math.ceil(len(TASKS["modadd"]().train_rows) / modadd.batch_size)
    assert modadd.steps == 5_000 * n_batches == 50_000                           # 5,000 epochs (App. D.3)
    lines = capsys.readouterr().out.splitlines()
    paper = {" ".join(line.split()[:-3]): line.split()[-1] for line in lines if "width" in line and " 0.500 " in line}
    assert len(paper) == 20 and float(paper["needle: lstm, fully trained, width 1024"]) == 0.995


def test_the_width_figure_shows_medians_chance_and_what_is_published(tmp_path, monkeypatch, figures):
    scores = {16: [0.1, 0.2, 0.9], 1024: [0.7, 0.8, 1.0]}
    fake_runs(monkeypatch, lambda args: scores[args.n_embd][args.seed])
    flags = ["--preset", "paper", "--task", "parens", "addition", "--train", "embeddings", "--seed", "0", "1", "2", "--plot"]
    random_transformer.main([*flags, "--device", "cpu", "--out-dir", tmp_path])
    parens, addition = figures["width"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in addition.lines}
    assert lines["measured: random"] == [[4, 0.2], [10, 0.8]] and [label.get_text() for label in addition.get_xticklabels()] == ["16", "1024"]
    assert lines["paper: random"] == [[4, 0.266], [10, 1.0]]
    assert lines["trivial: one answer at each position"] == [[4, 0.25], [10, 0.25]]
    assert parens.get_xlabel() == "width" and parens.get_ylabel() == "test accuracy"


@pytest.mark.parametrize("flags, shown", [([], True), (["--n-layer", "3"], False), (["--size", "20"], False),
                                          (["--steps", "100"], False), (["--n-embd", "32"], False)])
def test_a_published_number_stands_beside_the_published_setting_alone(tmp_path, monkeypatch, capsys, flags, shown):
    fake_runs(monkeypatch, lambda args: 0.5)
    command = ["--preset", "paper", "--task", "parens", "--train", "embeddings", "--n-embd", "16", *flags]
    random_transformer.main([*command, "--device", "cpu", "--out-dir", tmp_path])
    out = capsys.readouterr().out
    assert ("0.873" in out) == shown


@pytest.mark.parametrize("flags, message", [
    ("--n-embd 16 18", "18 is not divisible by n_head 4"),
    ("--size 40", "parens: 40 is not in range"),
    ("--task lm", "no TinyStories, give --text FILE: no route to host"),
    ("--task lm --text no_such_file", "no_such_file"),
    ("--task lm --text SHORT", "too few"),
    ("--task imitate --size 5", "--size has no effect"),
    ("--preset table1 --task modadd --n-embd 64", "Table 1 has no such row"),
])
def test_what_cannot_be_is_one_line_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "short").write_text("too few words")
    flags = flags.replace("SHORT", str(tmp_path / "short")).split()
    assert message in refused(random_transformer.main, tmp_path, "--device", "cpu", *flags)


def test_settings_without_effect_make_no_second_run(tmp_path):
    def names(*flags):
        return [run.folder.name for run in sweep(random_transformer.parse_args([*TINY, "--out-dir", str(tmp_path), *flags]))]
    assert len(names("--task", "parens", "imitate", "--target-width", "4", "8")) == 3
    assert len(names("--model", "lstm", "--train", "embeddings", "token_unembed", "full")) == 2
    assert names("--task", "needle") != names("--task", "needle", "--lr", "5e-3")


def test_the_readmes_task_is_all_that_it_takes(tmp_path, capsys, monkeypatch):
    """In a copy of the script, under another name: it trains, and has none of the others' numbers."""
    readme = (SCRIPT.parent / "README.md").read_text()
    block = re.search(r"```python\n(class Reverse.*?)```", readme, re.DOTALL)[1]
    ruler = "# ---- Tables and figures"                                          # follows TASKS
    (tmp_path / "reverse.py").write_text(SCRIPT.read_text().replace(ruler, f"{block}\n{ruler}"))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("reverse")
    flags = ["--task", "reverse", "--train", "full", "--n-embd", 16, "--steps", 5, "--device", "cpu"]
    result, = module.main([*flags, "--out-dir", tmp_path])
    out = capsys.readouterr().out
    assert 0 <= result["accuracy"] <= 1 and "reverse: fully trained, width 16" in out
    assert (tmp_path / "reverse").is_dir() and "paper" not in out[out.index("(parens)\n"):]
    task = module.TASKS["reverse"](5)
    tokens, scored = task.sample(3, generator())
    assert task.n_answers == 5
    for row, answers_here in zip(tokens.tolist(), scored.tolist()):
        assert row[5] == 10 and row[6:] == row[4::-1] and answers_here == [False] * 6 + [True] * 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11])
def test_a_wide_random_transformer_balances_what_a_narrow_one_does_not(tmp_path, seed):
    wide, narrow, *full = random_transformer.main(["--device", "cpu", "--seed", seed, "--out-dir", tmp_path])
    assert wide["accuracy"] >= 0.99 and narrow["accuracy"] <= 0.85 and all(x["accuracy"] >= 0.99 for x in full)
    # all that the narrow one sees is whether the number of brackets, the place of the "?", is even
    task, model = random_transformer.load(narrow["folder"])
    tokens, scored = task.test_set
    with torch.no_grad():
        labels = model(tokens[:, :-1]).argmax(-1)[scored[:, 1:]]
    brackets = (tokens == 3).int().argmax(1)
    assert torch.equal(labels == 2, brackets % 2 == 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_in_bfloat16_on_a_gpu(tmp_path):
    flags = ["--device", "cuda", "--compile", "--dtype", "bfloat16", "--task", "parens", "addition", "needle"]
    command = [sys.executable, str(SCRIPT), *TINY, *flags, "--size", "6", "--out-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---- What is trained on, measured and shown, once more in plain code --------------------------------------------------

def test_bits_a_parameter_are_nine_for_each_recalled_pair():
    args = argparse.Namespace(size=512)
    found = random_transformer.bits(args, dict(accuracy=0.5, n_trained=262_784))
    assert found == pytest.approx(9 * 512**2 / 2 / 262_784)


def test_the_subspace_and_the_attention_of_a_run_are_those_of_its_checkpoint(tmp_path):
    result, = random_transformer.main([*TINY, "--task", "needle", "--size", 3, "--steps", 2, "--out-dir", tmp_path])
    task, model = random_transformer.load(result["folder"])
    tokens, scored = (x[:20_000 // 8] for x in task.test_set)
    end = scored.int().argmax(1).tolist()                                        # the answer: what follows is padding
    with torch.no_grad():
        states = model.hidden_states(tokens[:, :-1])
        attns = model.attention(tokens[:, :-1])
    for i, state in enumerate(states):
        rows = torch.cat([x[:n] for x, n in zip(state, end)])
        assert (result["components"][i], result["neurons"][i]) == pytest.approx(explained_variance(rows))
    assert result["attention"] == random_transformer.find_needles(attns, tokens, scored)
    torch.testing.assert_close(attns[1].sum(-1), torch.ones(attns[1].shape[:-1]))
    assert not model.training
    assert random_transformer.evaluate(model, task, *task.test_set)["accuracy"] == result["accuracy"]


def test_the_logged_loss_is_the_mean_over_the_answers_of_the_batch_of_the_seed(tmp_path):
    run = one_run(tmp_path, "--task", "addition", "--size", 2, "--steps", 1, "--seed", 3)
    task, model = random_transformer.build(run.args)
    common.seed_everything(0)
    random_transformer.train(run.args, run)                                      # the same initial weights
    tokens, scored = task.sample(8, generator(3))
    scored = scored & ~task.held_out(tokens)[:, None]
    expected = random_transformer.evaluate(model, task, tokens, scored)["loss"]
    assert run.metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path, monkeypatch):
    norms = []
    step, losses = torch.optim.AdamW.step, TASKS["parens"].losses

    def watched(self):
        gradients = [p.grad.norm().item() for group in self.param_groups for p in group["params"]]
        norms.append(math.hypot(*gradients))
        return step(self)
    monkeypatch.setattr(TASKS["parens"], "losses", lambda self, *rest: 1_000 * losses(self, *rest))
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = one_run(tmp_path, "--steps", "2")
    random_transformer.train(run.args, run)
    assert norms == pytest.approx([1, 1], rel=1e-3)


def test_the_target_to_imitate_is_one_for_all_seeds_and_moves_no_random_number():
    targets = []
    for seed in 1, 2:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        targets.append(TASKS["imitate"](6).target.state_dict())
        assert torch.equal(torch.get_rng_state(), before)                        # the students' weights are their seed's
    torch.manual_seed(0)                                                         # the default seed's student
    student = Transformer(512, 40, 3, 2, 6).state_dict()
    for name, weights in targets[0].items():
        assert torch.equal(weights, targets[1][name])
        if weights.dim() == 2:                                                   # and no student begins as its target
            assert F.cosine_similarity(weights.flatten(), student[name].flatten(), dim=0).abs() < 0.4, name


def test_needles_are_found_by_one_head_and_not_by_the_best_of_each_sequence():
    tokens, scored = TASKS["needle"](3).sample(50, generator())
    attns = torch.rand(2, 50, 2, 7, 7, generator=generator())
    to_marker, to_value = [], []                                                 # (H,) each
    for b, (row, answer) in enumerate(zip(tokens.tolist(), scored.tolist())):
        query = answer.index(True) - 1
        for value in range(1, query, 2):
            to_marker.append(attns[0, b, :, value, value - 1])
        to_value.append(attns[1, b, :, query, row.index(row[query] - 30) + 1])
    expected = [torch.stack(found).mean(0).max().item() for found in (to_marker, to_value)]
    assert random_transformer.find_needles(list(attns), tokens, scored) == pytest.approx(expected, rel=1e-5)
