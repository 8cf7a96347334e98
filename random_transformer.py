r"""
Algorithmic Capabilities of Random Transformers.
Zhong, Andreas. NeurIPS 2024, arXiv 2410.04368.

Freeze every attention and MLP weight of a transformer at its random initialisation and train only
the embeddings and the unembedding: it still learns modular addition, associative recall, decimal
addition, balancing parentheses, even some language. The abilities were there; training picks the
subspace that uses them. This takes a wide model.

What to look for in the table of accuracies: `embeddings`, the random transformer, solves the task
when wide but not when narrow; `full`, full training, solves parentheses at both widths. In this
training the narrow random model only notices that an odd number of brackets cannot be balanced,
which gives 0.683; with larger batches and more steps it gets to 0.84 (RESULTS.md).

    python random_transformer.py                             parentheses, widths 128 and 16
    python random_transformer.py --preset medium --plot      the threshold in width, four tasks
    python random_transformer.py --preset paper --table1     Table 1; add --seed 0 1 2 3 4 5 6 7 8 9

    Table 2, what has to be trained; Tables 4 and 5, the subspace, stand below all other scores:
    python random_transformer.py --preset paper --n-embd 1024 \
        --train full embeddings token_unembed embed unembed
    Table 3, bits a parameter (the authors' script trained at --lr 5e-3); Table 6, parameters:
    python random_transformer.py --preset paper --task memorize --n-embd 128
    python random_transformer.py --preset paper --params
    Table 9, linear attention; the threshold in width at the paper's size:
    python random_transformer.py --preset paper --model linear --n-embd 1024
    python random_transformer.py --preset paper --train embeddings --n-embd 16 64 256 1024 --plot
    Fig. 2, the attention of associative recall; Fig. 3, the circle of modular addition:
    python random_transformer.py --preset paper --task needle --n-embd 1024 --plot
    python random_transformer.py --preset paper --task modadd --n-embd 1024 --plot
    Fig. 4, a language model of TinyStories (downloaded, or --text FILE), and its prose; its loss
    is of words, the paper's of BPE tokens:
    python random_transformer.py --preset paper --task lm --n-embd 16 32 64 128 256 512 --plot
    Fig. 6, imitation of random transformers of many widths:
    python random_transformer.py --preset paper --task imitate --n-embd 512 --plot

To lift: a task needs Task (Needle, Addition, Parens: HashedTask, too; Modadd, Memorize: Lookup),
functools and torch; drop its `published`, or take table1 along. Transformer needs init_, Block,
Attention, SumOfValues, pick and common's CausalSelfAttention, MLP and gpt2_init_; train_only needs
TRAINABLE; explained_variance, find_needles, answers and circuit need torch alone.
"""
import functools
import itertools
import math
import os
import re
import statistics
import textwrap
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (App. D.1) ------------------------------------------------------------------------

# Table 1's columns: model, what is trained, width
TABLE1 = [("transformer", "embeddings", 1024), ("transformer", "embeddings", 16),
    ("transformer", "full", 1024), ("transformer", "full", 16), ("lstm", "full", 1024)]

def table1(*medians, fails):
    """A task's published accuracies by column: of Table 1, and what fails in Table 2."""
    numbers = dict(zip(TABLE1, medians, strict=True))
    for part in fails:
        numbers["transformer", part, 1024] = "fails"
    return numbers

class Task:
    """A distribution of sequences; the model is trained and tested on some tokens, the answers.

    sample(batch, generator) -> tokens (B, T), scored (B, T) bool, true where a token is an answer.
    At most n_answers are scored in a sequence, and T - 1 <= block_size tokens are fed. ValueError
    where there is no task of that size. A task states, in its class, all that is named in STATED.
    """
    STATED = "sizes vocab_size block_size sample published quick paper".split()

    n_answers = 1
    trivial = None                                           # an answer without the ability, as
    chance = None                                            # words, and its accuracy
    metric = "accuracy"                                      # or "loss", in nats
    size_flag = "size"                                       # the flag that gives the size
    needs_text = False
    usual = dict(n_layer=2, n_head=4, dropout=0.0, weight_decay=1e-3)   # where a preset is silent

    def __init__(self, size=None, device="cpu"):
        self.size = self.paper["size"] if size is None else size
        self.device = device
        if self.size not in self.sizes:
            name = type(self).__name__.lower()
            which = "even sizes" if self.sizes.step == 2 else "sizes"
            first, last = self.sizes[0], self.sizes[-1]
            raise ValueError(f"{name}: {size} is not among the {which} {first} to {last}")

    @functools.cached_property
    def test_set(self):
        """The fixed test set: tokens, scored. Here 4,000 sequences from a seed of its own."""
        return self.sample(4_000, torch.Generator(self.device).manual_seed(10**9))

    def held_out(self, tokens):
        """Which of tokens (B, T) are for the test alone: (B,) bool. Here none."""
        return tokens.new_zeros(len(tokens), dtype=torch.bool)

    def losses(self, logits, targets, tokens):
        """The loss of each answer in nats, (B, Q): cross-entropy.

        logits (B, Q, V); targets (B, Q), -100 for none, whose loss is 0; tokens (B, T).
        """
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets)

    def scored_from(self, tokens, first):
        """tokens (B, T), and that all of them from position `first` on are answers."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens, (position >= first).expand_as(tokens)

class HashedTask(Task):
    """A task that holds out a twentieth of all sequences, told by a hash of their tokens.

    Short sequences are drawn again and again: of a test set drawn like the training data, training
    would have seen most. Were 4,000 draws held out by name, training would lack every short one.
    """
    PRIME = 1_000_003

    def __init__(self, size=None, device="cpu"):
        super().__init__(size, device)
        generator = torch.Generator().manual_seed(0)
        self.hash_weights = torch.randint(self.PRIME, (1_000,), generator=generator).to(device)

    def held_out(self, tokens):
        """Which of tokens (B, T) are for the test alone, the same in every run: (B,) bool."""
        weights = self.hash_weights[:tokens.shape[1]]
        return (tokens * weights).sum(1) % self.PRIME % 20 == 0

    @functools.cached_property
    def test_set(self):
        """The fixed test set: tokens, scored. The first 4,000 sequences drawn that are held out."""
        generator = torch.Generator(self.device).manual_seed(10**9)
        all_tokens, all_scored = [], []
        while sum(map(len, all_tokens)) < 4_000:
            tokens, scored = self.sample(20_000, generator)
            held_out = self.held_out(tokens)
            all_tokens.append(tokens[held_out])
            all_scored.append(scored[held_out])
        return torch.cat(all_tokens)[:4_000], torch.cat(all_scored)[:4_000]

class Lookup(Task):
    """Sequences x, y, z, of which z is the answer: the rows of train_rows (n, 3)."""
    block_size = 5                                           # the paper's: more than is used
    trivial = "any number"

    def sample(self, batch, generator):
        n_rows = len(self.train_rows)
        rows = torch.randint(n_rows, (batch,), generator=generator, device=self.device)
        return self.scored_from(self.train_rows[rows], 2)

class Modadd(Lookup):
    """a, b, (a + b) mod p. Of all p^2 pairs a fixed 5% are held out for the test."""
    sizes = range(5, 2_000)
    vocab_size = None                                        # p, the size
    quick = dict(size=59, steps=600, batch_size=1_500, lr=5e-3)
    paper = dict(size=199, steps=50_000, batch_size=4_000, lr=1e-3)          # 5,000 epochs
    published = table1("1.000", "0.013", "1.000", "0.972", "1.000", fails=["unembed", "embed"])

    def __init__(self, size=None, device="cpu"):
        super().__init__(size, device)
        p = self.vocab_size = self.size
        self.chance = 1 / p
        a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
        self.table = torch.stack([a, b, (a + b) % p], dim=1).to(device)      # (p^2, 3)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(p * p, generator=generator).to(device)
        test_rows, self.train_rows = self.table[order].tensor_split([p * p // 20])
        self.test_set = self.scored_from(test_rows, 2)

class Memorize(Lookup):
    """x, y, z: a fixed random z for each of n x n pairs; y's ids begin at n. The test is what is
    trained, shuffled: a part of it has all x."""
    sizes = range(5, 2_000)
    vocab_size = None                                        # 2 n
    quick = dict(size=64, steps=2_000, batch_size=512, lr=5e-3)
    # 21,000 epochs, in the released code without replacement
    paper = dict(size=512, steps=168_000, batch_size=2**15, lr=1e-3, weight_decay=1e-4)
    published = {
        ("transformer", "embeddings", 128): "0.41 bits",
        ("transformer", "full", 128): "2.88 bits",
    }

    def __init__(self, size=None, device="cpu"):
        super().__init__(size, device)
        n = self.size
        self.vocab_size = 2 * n
        self.chance = 1 / n
        x, y = torch.cartesian_prod(torch.arange(n), torch.arange(n, 2 * n)).T
        generator = torch.Generator().manual_seed(0)
        z = torch.randint(n, (n * n,), generator=generator)
        self.train_rows = torch.stack([x, y, z], dim=1).to(device)
        order = torch.randperm(n * n, generator=generator).to(device)
        self.test_set = self.scored_from(self.train_rows[order], 2)

class Needle(HashedTask):
    """Associative recall: k ~ U[1, size] pairs of marker and value, then a marker's query, a value.

    Markers 128..157, distinct and shuffled; values 1..127; the query is the marker + 30; 0 pads.
    With 4 pairs at most, the released code draws its markers from 4, and not from 30.
    """
    sizes = range(1, 31)
    vocab_size = 256
    block_size = 100                                         # the paper's: more than is used
    trivial = "the prompt's most frequent value"             # where training has its plateau
    quick = dict(size=4, steps=6_000, batch_size=128, lr=1e-3)
    paper = dict(size=30, steps=10_000, batch_size=1_000, lr=1e-3)
    published = table1("1.000", "0.075", "1.000", "0.120", "0.995", fails=["unembed"])

    def sample(self, batch, generator):
        n = self.size
        draw = dict(generator=generator, device=self.device)
        k = torch.randint(1, n + 1, (batch, 1), **draw)
        markers = 128 + torch.rand(batch, 30, **draw).argsort(1)[:, :n]      # (B, n)
        values = torch.randint(1, 128, (batch, n), **draw)                   # (B, n)
        asked = (torch.rand(batch, 1, **draw) * k).long()                    # which of the k pairs
        pairs = torch.stack([markers, values], dim=2).flatten(1)             # (B, 2n)
        position = torch.arange(2 * n + 2, device=self.device)
        tokens = F.pad(pairs, (0, 2)) * (position < 2 * k)                   # (B, 2n + 2)
        tokens.scatter_(1, 2 * k, markers.gather(1, asked) + 30)
        tokens.scatter_(1, 2 * k + 1, values.gather(1, asked))
        return tokens, position == 2 * k + 1

    @functools.cached_property
    def chance(self):
        """How often the prompt's most frequent value (of several, any) is the answer."""
        tokens, scored = self.test_set                                       # (N, T) each
        is_value = (tokens > 0) & (tokens < 128) & ~scored
        counts = torch.zeros(len(tokens), 128, dtype=torch.long, device=self.device)
        counts.scatter_add_(1, tokens * is_value, is_value.long())           # (N, values)
        most = counts == counts.amax(1, keepdim=True)
        is_answer = most.gather(1, tokens[scored][:, None])[:, 0]            # (N,)
        return (is_answer / most.sum(1)).mean().item()

class Addition(HashedTask):
    """a + b = sum, then a stop; a and b uniform over numbers of `size` digits, lowest digit first.

    Digits 0-9, + 10, = 11, pad 12; the answers: digits of the sum 20-29, stop 30. So the paper's
    text; its released code scores from the second digit to one pad after the stop. The two do not
    compare: the best guess from a position and the token before it makes 0.211 here, 0.288 there.
    """
    sizes = range(1, 18)
    vocab_size = 31
    block_size = None                                        # by the size
    trivial = "one answer at each position"
    quick = dict(size=3, steps=2_000, batch_size=128, lr=5e-3)
    paper = dict(size=10, steps=10_000, batch_size=1_000, lr=1e-3)
    published = table1("1.000", "0.266", "1.000", "0.675", "0.530",
        fails=["unembed", "token_unembed"])

    def __init__(self, size=None, device="cpu"):
        super().__init__(size, device)
        self.block_size = 3 * self.size + 10
        self.n_answers = self.size + 2
        self.powers = 10 ** torch.arange(self.size, device=device)

    def sample(self, batch, generator):
        n = self.size
        draw = dict(generator=generator, device=self.device)
        digits = torch.randint(10, (2, batch, n), **draw)    # of a and b, lowest first
        digits[..., -1] = torch.randint(1, 10, (2, batch), **draw)           # no leading zeros
        total = (digits * self.powers).sum((0, 2))[:, None]  # (B, 1): a + b
        has_carry = total >= 10 * self.powers[-1]            # (B, 1): the sum has n + 1 digits
        parts = [
            digits[0], torch.full_like(total, 10),           # a +
            digits[1], torch.full_like(total, 11),           # b =
            20 + total // self.powers % 10,                  # (B, n): the sum's n lowest digits
            torch.where(has_carry, 21, 30),                  # the carry, or the stop
            torch.where(has_carry, 30, 12),                  # the stop, or a pad
        ]
        tokens, scored = self.scored_from(torch.cat(parts, dim=1), 2 * n + 2)
        return tokens, scored & (tokens != 12)

    @functools.cached_property
    def chance(self):
        """How often the most frequent answer of its position is right."""
        tokens, scored = self.test_set                                       # (N, T) each
        right = 0
        for position in range(2 * self.size + 2, tokens.shape[1]):
            answers_here = tokens[scored[:, position], position]
            right += answers_here.bincount().max().item()
        return right / scored.sum().item()

class Parens(HashedTask):
    """Up to 2 size brackets, "(" 1 and ")" 2, then "?" 3, and a label: 2 for balanced, else 1.

    A third are uniformly random strings, the rest random balanced ones, of which half are left as
    they are. All others get swaps with probability 1/2, and flips with probability 1/2. All strings
    of up to 8 brackets are for training (in the released code they are in the test set as well): of
    so few, none follows from the others.
    """
    sizes = range(5, 40)
    vocab_size = 4
    block_size = 80                                          # the paper's: more than is used
    trivial = "even lengths are balanced"
    quick = dict(size=10, steps=1_000, batch_size=128, lr=5e-3)
    paper = dict(size=30, steps=10_000, batch_size=1_000, lr=1e-3)
    published = table1("1.000", "0.873", "0.923", "1.000", "1.000", fails=["unembed"])

    def held_out(self, tokens):
        has_nine_brackets = (tokens[:, :9] != 3).all(1)      # "?" comes later
        return super().held_out(tokens) & has_nine_brackets

    @functools.cached_property
    def chance(self):
        """How often a string of even length is balanced, or one of odd length is not."""
        tokens, scored = self.test_set                                       # (N, T) each
        length = (tokens == 3).int().argmax(1)
        is_balanced = tokens[scored] == 2                                    # (N,)
        return ((length % 2 == 0) == is_balanced).float().mean().item()

    def balanced(self, pairs, generator):
        """Random balanced strings g(pairs) for (B,) -> is_close (B, 2 self.size), true at each ")".

        g(1) = "()", and g(t) is "(" g(t-1) ")" or g(u) g(t-u) with u ~ U[1, t-1], each with
        probability 1/2. All parts of all strings grow at once. `t` holds, where a part g(t)
        starts, its t, else 0; a round replaces each part by what it consists of. For instance

            g(3)           t 3 . . . . .        splits with u = 1, into g(1) and g(2)
            g(1)  g(2)     t 1 . 2 . . .        g(1) closes at 1; g(2) wraps g(1), closes at 5
            ( ) ( g(1) )   t . . . 1 . .        g(1) closes at 4
            ( ) ( ( )  )   t . . . . . .        is_close at 1, 4 and 5
        """
        B = len(pairs)
        N = 2 * self.size + 2
        nowhere = N - 1                                      # a place that is cut off in the end
        start = torch.arange(N, device=self.device).expand(B, N)
        is_close = torch.zeros(B, N, dtype=torch.bool, device=self.device)
        t = torch.zeros_like(start)
        t[:, 0] = pairs
        for _ in range(self.size):                           # g(t) is done in t rounds
            coin, share = torch.rand(2, B, N, generator=generator, device=self.device)
            wraps = (t == 1) | ((t > 1) & (coin < 0.5))      # "(" g(t-1) ")"
            splits = (t > 0) & ~wraps                        # g(u) g(t-u)
            close = torch.where(wraps, start + 2 * t - 1, nowhere)
            is_close.scatter_(1, close, True)
            inner = torch.where(wraps, t - 1, 0)             # starts one place further on
            u = torch.where(splits, 1 + (share * (t - 1)).long(), 0)         # g(u) starts here
            rest = torch.where(splits, t - u, 0)             # g(t-u) starts 2u further on
            rest_start = torch.where(splits, start + 2 * u, nowhere)
            t = u + F.pad(inner, (1, -1))
            t = t.scatter_add(1, rest_start, rest)
        return is_close[:, :N - 2]

    def geometric(self, batch, generator):
        """1, 2, .., 21 with probabilities 1/2, 1/4, ..: (batch, 1)."""
        uniform = torch.rand(batch, 1, generator=generator, device=self.device)
        return 1 - uniform.clamp_min(2**-20).log2().ceil().long()

    def swap(self, is_close, length, generator):
        """Tries a geometric number of random pairs of positions, one after the other, and swaps
        those whose first is left of the second. length (B, 1)."""
        B = len(is_close)
        n_tries = self.geometric(B, generator)                               # (B, 1)
        for n in range(21):
            uniform = torch.rand(B, 2, generator=generator, device=self.device)
            pair = (uniform * length).long()                                 # (B, 2): i, j
            swapped = is_close.scatter(1, pair, is_close.gather(1, pair.flip(1)))
            from_left = pair[:, :1] < pair[:, 1:]                            # (B, 1): i < j
            is_close = torch.where((n < n_tries) & from_left, swapped, is_close)
        return is_close

    def flip(self, is_close, length, generator):
        """Flips a geometric number of random positions, or, with probability 2/3, twice as many."""
        B = len(is_close)
        draw = dict(generator=generator, device=self.device)
        twice = torch.rand(B, 1, **draw) < 2 / 3
        n_flips = self.geometric(B, generator) * (1 + twice.long())          # (B, 1), at most 42
        position = (torch.rand(B, 42, **draw) * length).long()               # (B, 42)
        counts = (torch.arange(42, device=self.device) < n_flips).long()     # only the first ones
        times = torch.zeros_like(is_close, dtype=torch.long).scatter_add(1, position, counts)
        return is_close ^ (times % 2 == 1)                   # flipped twice is as it was

    def sample(self, batch, generator):
        N = 2 * self.size
        draw = dict(generator=generator, device=self.device)
        pairs = torch.randint(1, self.size + 1, (batch,), **draw)
        is_random = torch.rand(batch, 1, **draw) < 1 / 3                     # (B, 1)
        random_length = torch.randint(1, N + 1, (batch, 1), **draw)
        length = torch.where(is_random, random_length, 2 * pairs[:, None])   # (B, 1)
        random_string = torch.rand(batch, N, **draw) < 0.5                   # (B, N), true: ")"
        is_close = torch.where(is_random, random_string, self.balanced(pairs, generator))
        mutates = is_random | (torch.rand(batch, 1, **draw) < 0.5)
        swaps = mutates & (torch.rand(batch, 1, **draw) < 0.5)
        is_close = torch.where(swaps, self.swap(is_close, length, generator), is_close)
        flips = mutates & (torch.rand(batch, 1, **draw) < 0.5)
        is_close = torch.where(flips, self.flip(is_close, length, generator), is_close)
        # balanced: never more closed than opened, and in the end as many
        position = torch.arange(N + 2, device=self.device)
        inside = position[:N] < length                                       # (B, N)
        depth = torch.where(inside, 1 - 2 * is_close.long(), 0).cumsum(1)
        is_balanced = (depth.amin(1) >= 0) & (depth[:, -1] == 0)
        label = 1 + is_balanced.long()[:, None]                              # (B, 1)
        brackets = torch.where(inside, 1 + is_close.long(), 0)
        tokens = F.pad(brackets, (0, 2))                                     # (B, N + 2)
        tokens.scatter_(1, length, 3)
        tokens.scatter_(1, length + 1, label)
        return tokens, position == length + 1

class Imitate(Task):
    """40 random tokens; the answer, whose token is a mere 0, is a random transformer's distribution
    over the next one.

    This target has 3 layers and 2 heads; its query, key and value weights are GPT-2's x10, its MLP
    output weights x20, its unembedding has standard deviation 2 / sqrt(width).
    """
    sizes = range(2, 2_000, 2)
    vocab_size = 512
    block_size = 40
    metric = "loss"                                          # KL(target | model), in nats
    size_flag = "target_width"
    usual = dict(Task.usual, n_layer=3)
    quick = dict(steps=500, batch_size=64, lr=5e-3)
    paper = dict(steps=10_000, batch_size=1_000, lr=1e-3)
    published = {}

    def __init__(self, width=32, device="cpu"):
        super().__init__(width, device)
        with torch.random.fork_rng(), torch.no_grad():
            # The same target for every student, and no student's own initial weights
            common.seed_everything(10**9)
            self.target = Transformer(self.vocab_size, self.block_size, 3, 2, width)
            for block in self.target.h:
                block.attn.c_attn.weight *= 10
                block.mlp.c_proj.weight *= 20
            self.target.lm_head.weight.normal_(std=2 / math.sqrt(width))
        self.target.to(device)

    def sample(self, batch, generator):
        shape = (batch, self.block_size)
        tokens = torch.randint(self.vocab_size, shape, generator=generator, device=self.device)
        return self.scored_from(F.pad(tokens, (0, 1)), self.block_size)

    @torch.no_grad()
    def log_probs(self, tokens):
        """The target's log probabilities after the 40 tokens: (B, 41) -> (B, 1, V)."""
        last = torch.full_like(tokens[:, :1], self.block_size - 1)
        return self.target(tokens[:, :-1], last).log_softmax(-1)

    def losses(self, logits, targets, tokens):
        """KL(target | model) in nats, (B, 1)."""
        log_q = logits.log_softmax(-1)
        log_p = self.log_probs(tokens)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    def describe(self):
        """Mean entropy of the target's output, and mean KL between two of its outputs, in nats."""
        log_p = self.log_probs(self.test_set[0][:500])[:, 0]                 # (500, V)
        p = log_p.exp()
        entropy = -(p * log_p).sum(1).mean()
        kl = (p * (log_p - log_p.roll(1, 0))).sum(1).mean()
        return [entropy.item(), kl.item()]

class LM(Task):
    """Windows of a text's words and punctuation marks: the size - 1 most frequent, an unknown 0.

    The test's 200 windows come from TinyStories' own validation split, or, of another text, from
    its last 5%, which is not trained on.
    """
    sizes = range(2, 10**6)
    vocab_size = None                                        # the size, or less for a small text
    block_size = 512
    n_answers = 512
    metric = "loss"
    needs_text = True
    usual = dict(n_layer=4, n_head=8, dropout=0.1, weight_decay=1e-3)
    quick = dict(size=1_000, steps=200, batch_size=4, lr=5e-3)
    # 5 epochs; layers, heads and dropout as released
    paper = dict(size=10_000, steps=230_000, batch_size=20, lr=6e-4, weight_decay=0.1)
    published = {}                                           # its 2.64 nats are of BPE tokens

    def __init__(self, size=None, text=None, device="cpu"):
        super().__init__(size, device)
        path = text or tinystories("train")
        most_common = Counter(words_of(path)).most_common(self.size - 1)
        self.words = ["<unknown>", *[word for word, _ in most_common]]
        self.vocab_size = len(self.words)
        ids = self.ids(path)
        if text:
            self.train_ids, self.test_ids = ids.tensor_split([len(ids) * 95 // 100])
        else:
            self.train_ids, self.test_ids = ids, self.ids(tinystories("valid"))
        if len(self.test_ids) <= self.block_size:
            enough = 20 * (self.block_size + 1)
            raise ValueError(f"lm: {len(ids):,} words of text are too few, {enough:,} would do")
        self.test_set = self.windows(self.test_ids, 200, torch.Generator(device).manual_seed(0))

    def ids(self, path):
        """A text as numbers (n,) int32: each word's place in self.words, 0 where it has none."""
        index = {word: i for i, word in enumerate(self.words)}
        ids = np.fromiter((index.get(word, 0) for word in words_of(path)), np.int32)
        return torch.from_numpy(ids).to(self.device)

    def windows(self, ids, batch, generator):
        """Windows of 513 words that begin anywhere in ids: (B, 513)."""
        n_starts = len(ids) - self.block_size
        starts = torch.randint(n_starts, (batch, 1), generator=generator, device=self.device)
        place = starts + torch.arange(self.block_size + 1, device=self.device)
        return self.scored_from(ids[place].long(), 1)

    def sample(self, batch, generator):
        return self.windows(self.train_ids, batch, generator)

def words_of(path):
    """The words and punctuation marks of a text file, one after the other."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            yield from re.findall(r"<\|endoftext\|>|\w+(?:'\w+)*|[^\w\s]", line)

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/{}/main/TinyStories-{}.txt"

def tinystories(split):
    """The path of TinyStories' split, train or valid, downloaded to the cache folder on first use.

    The whole has the SHA-256 that the repository's Git LFS pointer names, or OSError.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanotheory"
    path = cache / f"TinyStories-{split}.txt"
    if path.exists():
        return path
    with urllib.request.urlopen(TINYSTORIES.format("raw", split), timeout=30) as response:
        pointer = response.read().decode()
    digest = re.search(r"sha256:(\w+)", pointer)[1]
    cache.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(TINYSTORIES.format("resolve", split), str(path), digest)
    except RuntimeError as error:                            # another hash: it broke off
        raise OSError(error) from None
    return path

TASKS = {
    "modadd": Modadd,
    "needle": Needle,
    "addition": Addition,
    "parens": Parens,
    "memorize": Memorize,
    "imitate": Imitate,
    "lm": LM,
}

def check_task(name, task):
    """TypeError, with what is missing, for a task that does not state all that it should."""
    for what in Task.STATED:
        if not hasattr(task, what):
            raise TypeError(f"task {name} does not state {what}")
    for preset, flags in PRESETS.items():
        stated = {**flags, **(task.paper if preset == "paper" else task.quick)}
        for key in (task.size_flag, "steps", "batch_size", "lr"):
            if stated.get(key) is None:
                raise TypeError(f"task {name}, preset {preset}: no {key}")

# ---- The model ----------------------------------------------------------------------------------

def pick(x, at):
    """x (B, T, C) at the positions `at` (B, Q) alone, or everywhere for None -> (B, Q or T, C)."""
    return x if at is None else x.take_along_dim(at[..., None], dim=1)

class Attention(common.CausalSelfAttention):
    """GPT-2's attention: common's everywhere, written out here for some positions alone."""

    def forward(self, x, return_attn=False, at=None):
        """x (B, T, C) -> y (B, T, C), with return_attn also the attention weights (B, H, T, T).

        Or y (B, Q, C) at the positions `at` (B, Q): they alone ask a query, of all keys and values.
        """
        if at is None:
            return super().forward(x, return_attn)
        C = x.shape[-1]
        W, b = self.c_attn.weight, self.c_attn.bias
        q = F.linear(pick(x, at), W[:C], b[:C])              # (B, Q, C)
        k, v = F.linear(x, W[C:], b[C:]).split(C, dim=-1)    # (B, T, C) each

        def heads(y):
            return y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q, k, v = heads(q), heads(k), heads(v)               # (B, H, Q or T, C/H)
        is_future = torch.arange(x.shape[1], device=x.device) > at[..., None]          # (B, Q, T)
        scores = q @ k.mT / math.sqrt(q.shape[-1])           # (B, H, Q, T)
        attn = scores.masked_fill(is_future[:, None], -math.inf).softmax(-1)
        y = F.dropout(attn, self.dropout, self.training) @ v                 # (B, H, Q, C/H)
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)     # (B, Q, C)

class SumOfValues(common.CausalSelfAttention):
    """Linear attention: the sum of the values so far (App. E, as far as we know)."""

    def __init__(self, n_embd, dropout=0.0):
        super().__init__(n_embd, 1, dropout)
        self.c_attn = nn.Linear(n_embd, n_embd)              # values alone

    def forward(self, x, return_attn=False, at=None):
        """As Attention's; in place of the weights None, as there are none."""
        y = self.c_proj(pick(self.c_attn(x).cumsum(1), at))
        y = F.dropout(y, self.dropout, self.training)
        return (y, None) if return_attn else y

class Block(nn.Module):
    """A pre-norm GPT-2 block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, n_embd, n_head, linear=False, dropout=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        if linear:
            self.attn = SumOfValues(n_embd, dropout)
        else:
            self.attn = Attention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = common.MLP(n_embd, dropout)

    def forward(self, x):
        """x (B, T, C) -> x (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def at(self, x, at):
        """forward(x) at the positions `at` (B, Q) alone, or everywhere for None: (B, Q or T, C).

        Of the last block nobody needs more than the positions where an answer is predicted. It
        halves the time of a step of two layers and one answer.
        """
        x = pick(x, at) + self.attn(self.ln_1(x), at=at)
        return x + self.mlp(self.ln_2(x))

INITS = ["gpt2", "paper"]

@torch.no_grad()
def init_(model, init):
    """Random weights of a Transformer, in place; biases are zero. Standard deviations:

    gpt2: GPT-2's, 0.02; what writes to the residual stream 0.02 / sqrt(2 n_layer).
    paper: the paper's text, as an independent replication reads it: 0.02; in the MLP 0.01.
    """
    common.gpt2_init_(model, len(model.h))
    if init == "paper":
        for block in model.h:
            block.attn.c_proj.weight.normal_(std=0.02)
            block.mlp.c_fc.weight.normal_(std=0.01)
            block.mlp.c_proj.weight.normal_(std=0.01)

class Transformer(nn.Module):
    """GPT-2 with an unembedding of its own. Parameters a layer: 12 d^2 + 13 d;
    with linear attention 10 d^2 + 11 d."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, linear=False, dropout=0.0,
            init="gpt2"):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList()
        for _ in range(n_layer):
            self.h.append(Block(n_embd, n_head, linear, dropout))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        init_(self, init)

    def forward(self, tokens, at=None, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), or (B, Q, V) at the positions `at` (B, Q) alone.

        With return_attn also a list of each layer's attention weights, (B, H, T, T).
        """
        states = self.hidden_states(tokens, at)
        logits = self.lm_head(self.ln_f(states[-1]))
        if not return_attn:
            return logits
        attns = []
        for block, x in zip(self.h, states):
            attns.append(block.attn(block.ln_1(x), return_attn=True)[1])
        return logits, attns

    def hidden_states(self, tokens, at=None):
        """tokens (B, T) -> the states after the embedding and after each layer, (B, T, C) each.

        The last is (B, Q, C), at the positions `at` (B, Q) alone, where they are given.
        """
        x = self.drop(self.wte(tokens) + self.wpe.weight[:tokens.shape[1]])
        states = [x]
        for block in self.h[:-1]:
            x = block(x)
            states.append(x)
        return [*states, self.h[-1].at(x, at)]

class Recurrent(nn.Module):
    """An embedding, two recurrent layers (nn.LSTM or nn.RNN), and an unembedding with a bias."""

    def __init__(self, vocab_size, kind, n_embd, dropout=0.0):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.rnn = kind(n_embd, n_embd, num_layers=2, batch_first=True, dropout=dropout)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens, at=None):
        """tokens (B, T) -> logits (B, T, V), or (B, Q, V) at the positions `at` (B, Q) alone."""
        h, _ = self.rnn(self.wte(tokens))
        return self.lm_head(pick(h, at))

RECURRENT = {"lstm": nn.LSTM, "rnn": nn.RNN}
MODELS = ["transformer", "linear", *RECURRENT]

# What is trained, by module (Table 2). A recurrent network has no wpe and a transformer no rnn
TRAINABLE = {
    "full": ["wte", "wpe", "h", "rnn", "ln_f", "lm_head"],
    "embeddings": ["wte", "wpe", "lm_head"],                 # the paper's random transformer
    "token_unembed": ["wte", "lm_head"],
    "embed": ["wte", "wpe"],
    "unembed": ["lm_head"],
}

def train_only(model, which):
    """Freezes all but the parts that TRAINABLE[which] names, and returns their parameters."""
    for name, part in model.named_children():
        part.requires_grad_(name in TRAINABLE[which])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

# ---- Training (App. D.3) ------------------------------------------------------------------------

# What a preset leaves open (size, steps, batch, learning rate, ...) is the task's own, in its class
FOUR = ["modadd", "needle", "addition", "parens"]
PRESETS = {
    "quick": dict(
        task=["parens"], train=["embeddings", "full"],
        n_embd=[128, 16], target_width=[16],
    ),
    "medium": dict(
        task=FOUR, train=["embeddings"],
        n_embd=[16, 32, 64, 128, 256, 512], target_width=[16],
        eval_every=500,
    ),
    "paper": dict(
        task=FOUR, train=["embeddings", "full"],
        n_embd=[1024, 16],
        target_width=[4, 8, 12, 16, 32, 64, 128, 256, 512],
        init="paper", warmup=500, eval_every=500,
    ),
}
SWEEP = ["task", "model", "train", "n_embd", "target_width", "seed"]

for name, task in TASKS.items():
    check_task(name, task)
del name, task

def resolve(args):
    """Completes a run's settings by the task's own; None for what has no effect on it."""
    task = TASKS[args.task]
    own = task.paper if args.preset == "paper" else task.quick
    if args.lr is None and args.model == "lstm":
        args.lr = 5e-3
    if args.lr is None and args.train == "full":             # at 5e-3 width 128 fails at parens
        args.lr = min(own["lr"], 1e-3)
    for key, value in {**task.usual, **own}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    unused = "size" if task.size_flag == "target_width" else "target_width"
    setattr(args, unused, None)
    if not task.needs_text:
        args.text = None
    if args.model != "transformer":
        args.n_head = None                                   # a sum of values has no heads
    if args.model in RECURRENT:
        args.n_layer = None                                  # two layers
        args.init = None                                     # torch's
        if args.train == "token_unembed":
            args.train = "embeddings"                        # the same: there are no positions

@functools.lru_cache(maxsize=8)
def shared_task(kind, size, device, text, changed):
    """A task of some size, once: runs share it, and its test set, which can take seconds. changed:
    when the text was last written, as a new text is a new task."""
    text = dict(text=text) if kind.needs_text else {}
    return kind(size, device=device, **text)

def make_task(args):
    """The task of a run."""
    kind = TASKS[args.task]
    changed = Path(args.text).stat().st_mtime_ns if args.text else None
    text = str(args.text) if args.text else None             # a path, or what config.json has of it
    return shared_task(kind, getattr(args, kind.size_flag), str(args.device), text, changed)

def build(args):
    """The task and the model of a run."""
    task = make_task(args)
    if args.model in RECURRENT:
        model = Recurrent(task.vocab_size, RECURRENT[args.model], args.n_embd, args.dropout)
    else:
        sizes = task.vocab_size, task.block_size, args.n_layer, args.n_head, args.n_embd
        model = Transformer(*sizes, args.model == "linear", args.dropout, args.init)
    return task, model.to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run, ready to use."""
    return common.load(folder, build, device)

def learning_rate(step, args):
    """Linear warm-up to args.lr, then a cosine to 0 (in the authors' code, not in the paper)."""
    warm = min(1, (step + 1) / args.warmup)
    done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * warm * (1 + math.cos(math.pi * done)) / 2

def answers(tokens, scored, n):
    """Where up to n answers of a sequence are predicted, and what they are.

    tokens, scored (B, T) -> at (B, n), or None for every position; targets (B, n), -100 for none.
    An answer is predicted one position before its own: with n = 3,

        tokens   5  6  7 20 21 12     scored   .  .  .  x  x  .     at  2 3 0   targets  20 21 -100
    """
    predicts_answer = scored[:, 1:]                          # (B, T - 1): the next token is one
    next_token = tokens[:, 1:].masked_fill(~predicts_answer, -100)
    if n == next_token.shape[1]:
        return None, next_token
    # Sorted: the positions of the answers, in order, then other ones, whose next_token is -100
    at = predicts_answer.int().argsort(dim=1, descending=True, stable=True)[:, :n]
    return at, next_token.gather(1, at)

def make_optimizer(trained, lr, weight_decay):
    """AdamW. Biases and norms do not decay (the released code)."""
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() == 1]
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0.0)]
    how = dict(lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, **how, fused=True, capturable=lr.is_cuda)

def train(args, run):
    """One run of the sweep; goes on from its checkpoint where there is one."""
    task, model = build(args)
    most = task.test_set[1].sum(1).max().item()
    if most > task.n_answers:
        raise ValueError(f"{args.task}: a sequence has {most} answers, n_answers {task.n_answers}")
    trained = train_only(model, args.train)
    lr = torch.tensor(0.0, device=args.device)               # a tensor: a CUDA graph sees it change
    optimizer = make_optimizer(trained, lr, args.weight_decay)
    data = torch.Generator(args.device).manual_seed(args.seed)
    start = run.restore(model=model, optimizer=optimizer, data=data)
    for group in optimizer.param_groups:
        group["lr"] = lr                                     # restore put another tensor there

    def training_step():
        tokens, scored = task.sample(args.batch_size, data)                  # (B, T) each
        # Test sequences stay in the batch, unscored: to count and replace them, the CPU would have
        # to wait for the device
        scored = scored & ~task.held_out(tokens)[:, None]
        at, targets = answers(tokens, scored, task.n_answers)                # (B, Q) each
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens[:, :-1], at)                               # (B, Q, V)
        n_scored = (targets >= 0).sum().clamp_min(1)
        loss = task.losses(logits.float(), targets, tokens).sum() / n_scored
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if args.compile:
        training_step = common.compile_step(training_step, model, data)
    for step in run.steps(start, args.steps):
        lr.fill_(learning_rate(step, args))
        loss = training_step()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            model.eval()                                     # without dropout
            tokens, scored = task.test_set
            score = evaluate(model, task, tokens[:1_000], scored[:1_000])[task.metric]
            run.log(step + 1, loss=loss.item(), **{f"test_{task.metric}": score})
            run.save(step + 1)
            model.train()

# ---- Measurement --------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, task, tokens, scored):
    """Mean loss (nats) and accuracy over the answers of tokens, scored (N, T) each."""
    loss, right, n = 0.0, 0, 0
    size = max(1, 20_000 // tokens.shape[1])                 # sequences at once
    for tokens, scored in zip(tokens.split(size), scored.split(size)):
        at, targets = answers(tokens, scored, task.n_answers)
        logits = model(tokens[:, :-1], at).float()
        losses = task.losses(logits, targets, tokens)
        loss += losses.cpu().double().sum().item()           # on the CPU: mps has no float64
        right += (logits.argmax(-1) == targets).sum().item()
        n += (targets >= 0).sum().item()
    return dict(loss=loss / n, accuracy=right / n)

def explained_variance(hidden, top=10):
    """Shares of the variance of hidden (N, d) in its top components and neurons (Tables 4, 5)."""
    covariance = hidden.cpu().double().T.cov(correction=0)   # (d, d)
    shares = []
    for variances in (torch.linalg.eigvalsh(covariance), covariance.diagonal()):
        largest = variances.sort(descending=True).values[:top]
        shares.append((largest.sum() / variances.sum()).item())
    return tuple(shares)

def find_needles(attns, tokens, scored):
    """Fig. 2 as numbers: layer 1's attention from each value to its marker, the last layer's from
    the query to the value that it asks for; mean over positions and sequences, best head.

    attns: (B, H, T, T) each; tokens and scored (B, T + 1).
    """
    rows, query = scored[:, 1:].nonzero().T                  # one query a sequence
    value_at = torch.arange(1, attns[0].shape[-1], 2, device=tokens.device)  # positions 1, 3, ..
    to_marker = attns[0][:, :, value_at, value_at - 1].transpose(1, 2)       # (B, values, H)
    to_marker = to_marker[value_at < query[:, None]].mean(0)                 # (H,)
    asked = tokens[rows, query] - 30                                         # (B,)
    is_asked = tokens[:, :-1] == asked[:, None]                              # (B, T): its marker
    answer_at = is_asked.int().argmax(1) + 1                                 # (B,): after it
    to_value = attns[-1][rows, :, query, answer_at].mean(0)                  # (H,)
    return [to_marker.max().item(), to_value.max().item()]

@torch.no_grad()
def circuit(model, task):
    """Fig. 3 as numbers, after Zhong et al. 2023: [gradient symmetricity, distance irrelevance].

    The first is the mean cosine of the gradients of a logit with respect to the embeddings of a and
    of b; the second the spread of the right answer's logit among pairs of equal a - b, relative to
    its spread among all pairs. A pizza has 1 and 0, a clock 0 and 1.
    """
    p = task.vocab_size
    device = task.table.device
    generator = torch.Generator().manual_seed(0)
    tokens = task.table[torch.randperm(p * p, generator=generator)[:500]]    # (500, 3)
    output = torch.randint(p, (500,), generator=generator)[:len(tokens), None].to(device)
    with torch.enable_grad():
        embedded = model.wte(tokens[:, :2]).detach().requires_grad_()        # (500, 2, C)
        x = embedded + model.wpe.weight[:2]
        for block in model.h:
            x = block(x)
        logits = model.lm_head(model.ln_f(x[:, -1]))                         # (500, V)
        gradient, = torch.autograd.grad(logits.gather(1, output).sum(), embedded)
    symmetricity = F.cosine_similarity(gradient[:, 0], gradient[:, 1]).mean()
    right = []                                               # the logit of a + b, for all pairs
    for pairs in task.table.split(5_000):
        logits = model(pairs[:, :2])[:, -1]                  # (5000, V)
        right.append(logits.gather(1, pairs[:, 2:]))
    right = torch.cat(right).view(p, p)
    a = torch.arange(p)
    by_distance = right[a, (a - a[:, None]) % p]             # row d: all pairs a, a - d
    spread = by_distance.std(1, correction=0).mean() / right.std(correction=0)
    return [symmetricity.item(), spread.item()]

def write_prose(model, task, seed, n_words=60):
    """A text that the language model writes, from the test's first word on."""
    generator = torch.Generator(task.device).manual_seed(seed)
    ids = task.test_ids[None, :1].long()                     # (1, 1)
    for position in range(n_words):
        last = torch.full_like(ids[:, :1], position)
        next_word = model(ids, last)[:, 0].softmax(-1)       # (1, V)
        ids = torch.cat([ids, torch.multinomial(next_word, 1, generator=generator)], dim=1)
    text = " ".join(task.words[i] for i in ids[0].tolist())
    return re.sub(r" ([.,!?;:])", r"\1", text)

@torch.no_grad()
def measure(args, run):
    """The scores on the whole test set, and what else applies to a run, from its checkpoint."""
    task, model = load(run.folder, args.device)
    found = evaluate(model, task, *task.test_set)
    found["n_trained"] = n_numbers(train_only(model, args.train))
    if isinstance(model, Transformer):
        n = 20_000 // task.test_set[0].shape[1]
        tokens, scored = [x[:n] for x in task.test_set]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        last_answer = (scored * position).amax(1, keepdim=True)              # (n, 1)
        inside = position[:-1] < last_answer                                 # (n, T - 1)
        found["components"], found["neurons"] = [], []
        for state in model.hidden_states(tokens[:, :-1]):
            principal, neuron = explained_variance(state[inside])
            found["components"].append(principal)
            found["neurons"].append(neuron)
    if args.task == "needle" and args.model == "transformer":
        attns = model(tokens[:, :-1], return_attn=True)[1]
        found["attention"] = find_needles(attns, tokens, scored)
    if args.task == "modadd" and isinstance(model, Transformer):
        found["circuit"] = circuit(model, task)
    if args.task == "imitate":
        found["target"] = task.describe()
    if args.task == "lm":
        found["prose"] = write_prose(model, task, args.seed)
    return found

# ---- Tables and figures -------------------------------------------------------------------------

IN_WORDS = {
    "linear": "linear attention", "lstm": "LSTM", "rnn": "RNN",
    "full": "fully trained", "embeddings": "random, embeddings trained",
    "token_unembed": "random, no positions trained", "embed": "random, no unembedding trained",
    "unembed": "random, unembedding trained",
}

def column_of(args):
    """The column of a score: model, what is trained, width."""
    return args.model, args.train, args.n_embd

def row_of(args):
    """The row of a score: the task, of imitation also the target's width."""
    return f"{args.task} {args.target_width}" if args.task == "imitate" else args.task

def published(args):
    """The paper's number for a run's setting, median of 10 restarts, or an empty text. Its learning
    rates are not all known."""
    task = TASKS[args.task]
    for key, value in {**task.usual, **task.paper}.items():
        if key != "lr" and getattr(args, key) not in (None, value):
            return ""
    return task.published.get(column_of(args), "")

def print_scores(runs, results):
    """Table 1's layout: a row a task, a column a setting; beneath, the paper's numbers."""
    columns = list(dict.fromkeys(column_of(run.args) for run in runs))
    header = ["task"]
    for column in columns:
        header.append(" ".join(map(str, column)).removeprefix("transformer "))
    ours, papers = {}, {}                                    # (row, column) -> text
    for args, group in common.by_setting(runs, results):
        place = row_of(args), column_of(args)
        ours[place] = common.spread([result[TASKS[args.task].metric] for result in group])
        if args.task == "memorize":
            ours[place] += ", " + common.spread([bits(args, result) for result in group])
        papers[place] = published(args)
    table = []
    for row in dict.fromkeys(row for row, column in ours):
        table.append([row, *[ours.get((row, column), "") for column in columns]])
        paper = [papers.get((row, column), "") for column in columns]
        if any(paper):
            table.append(["paper", *paper])
    print("\nAccuracy on sequences that training never learns from, median [range] over seeds")
    print("(lm: loss, imitate: KL, in nats; memorize: of what is trained, and bits a parameter;")
    print("addition: the paper's numbers may include a pad and leave out the first digit)")
    common.print_table(header, table)
    trivial = {}                                             # task -> words and accuracy
    for run in runs:
        if words := TASKS[run.args.task].trivial:
            trivial[run.args.task] = f"{words}, {make_task(run.args).chance:.3f}"
    for task, text in trivial.items():
        print(f"A trivial answer to {task}: {text}")

def bits(args, result):
    """Table 3: log2 n bits for each of the n x n pairs that is recalled, a trained parameter."""
    recalled = args.size**2 * result["accuracy"]
    return math.log2(args.size) * recalled / result["n_trained"]

def n_numbers(parameters):
    """How many numbers some parameters hold together."""
    return sum(parameter.numel() for parameter in parameters)

FINDINGS = {
    "components": "Variance in the top 10 principal components: after the embedding, each layer",
    "neurons": "The same in the top 10 neurons (Tables 4, 5: a subspace, not a sparse subnetwork)",
    "attention": "Attention from value to marker, from query to value (Fig. 2)",
    "circuit": "Gradient symmetricity, distance irrelevance (Fig. 3; pizza 1, 0; clock 0, 1)",
    "target": "Entropy of the target's output, KL between two (paper: 2.89 to 3.02, 0.8 to 3.3)",
}

def print_findings(runs, results):
    """Tables 4 and 5, the numbers of Figs. 2, 3 and 6, and prose."""
    for key, title in FINDINGS.items():
        rows = []
        for run, result in zip(runs, results):
            if key in result:
                about = row_of(run.args), *column_of(run.args), run.args.seed
                numbers = "  ".join(f"{x:.2f}" for x in result[key])
                rows.append([*map(str, about), numbers])
        if rows:
            print(f"\n{title}")
            common.print_table(["task", "model", "trained", "width", "seed", ""], rows)
    for run, result in zip(runs, results):
        if "prose" in result:
            print(f"\nProse, {in_words(run.args)}, width {run.args.n_embd}")
            print(textwrap.fill(result["prose"], 100))

def print_parameters(runs):
    """Table 6: parameters by part, and how many are trained. Returns its rows as dicts.

    (The paper's 99,328 of modadd is 97 x 1024: p = 97.)
    """
    results, rows = [], []
    for run in runs:
        args = run.args
        model = build(args)[1]
        sizes = {}
        for name in ("wte", "wpe", "lm_head"):
            part = getattr(model, name, nn.Module())         # a recurrent network has no wpe
            sizes[name] = n_numbers(part.parameters())
        sizes["all"] = n_numbers(model.parameters())
        sizes["trained"] = n_numbers(train_only(model, args.train))
        setting = {key: getattr(args, key) for key in ("task", "model", "n_embd", "train")}
        results.append({**setting, **sizes})
        about = [row_of(args), args.model, str(args.n_embd), args.train]
        rows.append(about + [f"{n:,}" for n in sizes.values()])
    header = ["task", "model", "width", "train", "E_token", "E_pos", "U", "all", "trained"]
    common.print_table(header, rows)
    return results

MARKS = ["o-", "s--", "^-.", "D:", "v-", "P--", "X-."]

def in_words(args):
    """A line of the width figure, for its legend."""
    words = IN_WORDS[args.train]
    if args.model != "transformer":
        words = f"{IN_WORDS[args.model]}, {words}"
    return f"{words}, width {args.n_embd}" if args.task == "imitate" else words

def plot_widths(runs, results):
    """The score against the width, of imitation against the target's (Figs. 4, 6, the threshold).

    Lines are medians over seeds, in a band from the worst to the best; hollow marks are published.
    """
    tasks = {}                                               # task -> [(args, results)]
    for pair in common.by_setting(runs, results):
        tasks.setdefault(pair[0].task, []).append(pair)
    columns = min(2, len(tasks))
    figure, axes = common.new_figure(math.ceil(len(tasks) / columns), columns)
    for axis in axes.flat[len(tasks):]:
        axis.axis("off")
    for axis, (name, groups) in zip(axes.flat, tasks.items()):
        plot_task(axis, TASKS[name], groups)
        axis.set_title(name)
    common.save_figure(figure, runs, "width")

def plot_task(axis, task, groups):
    """One panel of the width figure; groups: [(args, results)] of the task."""
    imitates = task.size_flag == "target_width"
    lines = {}                                               # legend -> [(width, low, mid, high)]
    hollow = []                                              # [(width, score)], published
    for args, group in groups:
        width = args.target_width if imitates else args.n_embd
        scores = [result[task.metric] for result in group]
        point = width, min(scores), statistics.median(scores), max(scores)
        lines.setdefault(in_words(args), []).append(point)
        if re.fullmatch(r"[\d.]+", published(args)):         # not "fails", not "0.41 bits"
            hollow.append((width, float(published(args))))
    for mark, (words, points) in zip(itertools.cycle(MARKS), lines.items()):
        widths, low, mid, high = zip(*sorted(points))
        line, = axis.plot(widths, mid, mark, label=words)
        axis.fill_between(widths, low, high, color=line.get_color(), alpha=0.2)
    if hollow:
        axis.plot(*zip(*hollow), "ko", mfc="none", ms=10, label="published")
    if task.trivial:
        chance = make_task(groups[0][0]).chance
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
        axis.lines[-1].set_label(f"trivial: {task.trivial}")
        axis.set_ylim(-0.03, 1.03)
    all_widths = sorted({point[0] for points in lines.values() for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(all_widths, all_widths)
    axis.set_xlabel("width of the target" if imitates else "width")
    unit = "accuracy"
    if task.metric == "loss":
        unit = "KL (nats)" if imitates else "loss (nats)"
    axis.set_ylabel(f"test {unit}")
    axis.legend(fontsize=8)

@torch.no_grad()
def plot_attention(run):
    """Fig. 2: the attention of each head for one prompt of needle, up to 8 pairs long."""
    task, model = load(run.folder)
    tokens, scored = task.test_set
    query = scored.int().argmax(1) - 1                       # (N,)
    longest = torch.where(query <= 16, query, 0).argmax()    # of those whose names can be read
    prompt = tokens[longest, :query[longest] + 1]            # (T,)
    _, attns = model(prompt[None], return_attn=True)
    words = [str(value) for value in range(128)]
    words += [f"m{i}" for i in range(30)]                    # markers
    words += [f"?m{i}" for i in range(30)]                   # their queries
    names = [words[token] for token in prompt.tolist()]
    n_layer, n_head = len(attns), attns[0].shape[1]
    figure, axes = common.new_figure(n_layer, n_head, width=3, height=3)
    for (layer, head), axis in np.ndenumerate(axes):
        axis.imshow(attns[layer][0, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.supxlabel("looks at")
    figure.supylabel("token")
    common.save_figure(figure, [run], f"attention of {run.args.train} {run.args.n_embd}")

@torch.no_grad()
def plot_circle(run):
    """Fig. 3: the embeddings of modadd's numbers on their top two principal components."""
    task, model = load(run.folder)
    points = model.wte.weight - model.wte.weight.mean(0)                     # (p, C)
    components = torch.linalg.svd(points, full_matrices=False).Vh[:2]        # (2, C)
    x, y = (points @ components.T).T
    figure, axes = common.new_figure(width=4.6, height=4)
    axis = axes[0, 0]
    dots = axis.scatter(x, y, s=12, c=range(task.vocab_size), cmap="hsv")
    figure.colorbar(dots, label="number")
    axis.set_title(f"{IN_WORDS[run.args.train]}, width {run.args.n_embd}", fontsize=9)
    axis.set_xlabel("principal component 1")
    axis.set_ylabel("principal component 2")
    common.save_figure(figure, [run], f"circle of {run.args.train} {run.args.n_embd}")

def plot(runs, results):
    """The width figure; of the first seed's transformers Fig. 2 (needle) and Fig. 3 (modadd)."""
    plot_widths(runs, results)
    for run in runs:
        args = run.args
        if args.model == "transformer" and args.seed == runs[0].args.seed:
            if args.task == "needle":
                plot_attention(run)
            if args.task == "modadd" and args.n_embd > 1:    # two components
                plot_circle(run)

# ---- The command --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line."""
    parser = common.make_parser(main)
    add = parser.add_argument
    count = common.positive_int
    add("--task", nargs="+", choices=list(TASKS),
        help="tasks; at the quick sizes a random model solves parens from width 64 or 128 on, "
             "modadd and addition from 256, needle from 512")
    add("--model", nargs="+", choices=MODELS, default=["transformer"],
        help="linear: attention is a sum of values")
    add("--train", nargs="+", choices=list(TRAINABLE),
        help="what is trained; embeddings: the paper's random transformer")
    add("--n-embd", nargs="+", type=common.number(int, 1, 10**5), help="widths")
    add("--init", choices=INITS, default="gpt2",
        help="random weights of a transformer; gpt2: standard deviation 0.02, "
        "0.02 / sqrt(2 layers) of what writes to the residual stream; paper: 0.02, 0.01 in the MLP")
    add("--n-layer", type=common.number(int, 1, 100),
        help="layers of a transformer, also a linear one (2; imitate 3, lm 4)")
    add("--n-head", type=count, help="heads a layer of a softmax transformer (4; lm 8)")
    add("--dropout", type=common.number(float, 0, 0.99),
        help="share of units dropped in training (0; lm 0.1)")
    add("--size", type=count,
        help="modulus (modadd), most pairs (needle, parens), digits (addition), side of the table "
        "(memorize), or vocabulary (lm)")
    add("--target-width", nargs="+", type=count, help="imitate: widths of the targets")
    add("--text", type=common.data_path, help="lm: a text file (TinyStories, downloaded)")
    add("--steps", type=count, help="training steps (the task's own)")
    add("--batch-size", type=count, help="sequences a step (the task's own)")
    add("--lr", type=common.positive_float,
        help="peak learning rate of AdamW (the task's own; full: at most 1e-3; LSTM 5e-3)")
    add("--warmup", type=count, default=100, help="steps of linear warm-up, before a cosine to 0")
    add("--weight-decay", type=common.non_negative, help="weight decay of AdamW (the task's own)")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds of weights and data")
    add("--table1", action="store_true", help="Table 1's columns, widths up to 1024")
    add("--params", action="store_true", help="Table 6: count parameters, train nothing")
    args = common.parse_args(parser, PRESETS, argv)
    if args.params:
        common.refuse_others(parser, args, "params", "table1", "task", "model", "train", "n_embd",
            "n_layer", "n_head", "size", "target_width", "text")
    if args.table1:
        for flag in ("model", "train", "n_embd"):
            if flag in args.given:
                parser.error(f"--{flag} has no effect on --table1: leave it out".replace("_", "-"))
        # All that its columns name; main leaves out what is no column, such as a narrow LSTM
        columns = [list(dict.fromkeys(names)) for names in zip(*TABLE1)]
        args.model, args.train, args.n_embd = columns
    return args

def check(args):
    """Ends the program for a run that cannot be: of its number of heads, size or text."""
    if args.n_head and args.n_embd % args.n_head:
        common.fail(f"--n-embd {args.n_embd} is not divisible by --n-head {args.n_head}", 2)
    flags = f"--{TASKS[args.task].size_flag}".replace("_", "-")
    if args.text:
        flags += f", --text {args.text}"
    try:
        make_task(args)
    except ValueError as error:
        common.fail(f"{flags}: {error}", 2)
    except OSError as error:
        without = f"TinyStories did not come: {error}; give --text FILE"
        common.fail(f"--text: {error}" if args.text else without, 2)

def show(runs, results):
    """The tables of a sweep, and with --plot its figures."""
    print_scores(runs, results)
    print_findings(runs, results)
    if runs[0].args.plot:
        plot(runs, results)

def main(argv=None):
    """Trains what the flags ask for, prints the tables, and returns a list of results."""
    args = parse_args(argv)
    table1, params = args.table1, args.params
    args.table1 = args.params = False                        # they name runs: no run's setting
    runs = common.sweep(args, SWEEP, resolve)
    if table1:
        runs = [run for run in runs if column_of(run.args) in TABLE1]
    for i, run in enumerate(runs):
        check(run.args)
        run.number = f"{i + 1}/{len(runs)}"
    if params:
        return print_parameters(runs)
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
