"""Bad input to every script, in process: one line that says what is wrong, exit status 2, nothing printed, nothing written.

A line of BAD has flags, and after -> what the error says; without it, the error names the first flag. Names in capitals are
files that the test writes. toy.py stands for what common.py refuses in all scripts.
"""
import importlib
import importlib.util
import shlex

import pytest

# what the flags are added to
BASE = {
    "looped_icl": "--n-points 6 --points-start 4 --n-embd 16 --n-head 2 --curriculum-every 10 --loops 4 --window 2 --loops-every 10",
}
FILES = {
    "EMPTY": b"",
    "LOOPS": b"aaab",
    "TEXT": b"one two three. " * 4_000,
    "SHORT": b"one two.",
    "BINARY": bytes(range(256)),
    "TOKENS": b"0 1\n1 2\n2 0\n0 1 2 1",
}
BAD = {
    "toy": """
--steps 0
--steps -1
--steps 1.5
--steps x
--steps 1e3
--lr 0
--lr -1
--lr nan
--lr inf
--lr 1e308
--lr x
--seed -1
--seed 9223372036854775808
--seed x
--seed
--model tree
--model
--text nowhere.txt
--device tpu
--device cuda:99
--device cpu:1
--preset huge
--preset
--compile
--wdith 3
quick  ->  quick
--eval-every 0
--width 4
--depth 3
--width 0 --model mlp
--step 3
--out-dir EMPTY  ->  EMPTY is no folder
--out-dir EMPTY/x
""",
    "random_transformer": """
--n-embd 10  ->  not divisible
--n-embd 16 18  ->  --n-embd 18 is not divisible
--n-head 5  ->  not divisible
--size 40  ->  parens: 40 is not among the sizes 5 to 39
--size 4  ->  parens: 4 is not among the sizes
--task needle --size 31  ->  1 to 30
--task addition --size 18  ->  1 to 17
--task modadd --size 4  ->  modadd: 4
--task memorize --size 2000  ->  memorize
--task modadd parens --size 41  ->  parens: 41
--task imitate --target-width 5  ->  --target-width: imitate: 5
--task imitate --target-width 2000  ->  imitate: 2000
--task lm --size 1 --text TEXT  ->  lm: 1 is not among
--task lm --text no_such_file  ->  no_such_file
--task lm --text FOLDER  ->  directory
--task lm --text SHORT  ->  too few
--target-width 8  ->  --target-width has no effect
--text TEXT  ->  --text has no effect
--task imitate --size 5  ->  --size has no effect
--model lstm --n-layer 3  ->  --n-layer has no effect
--model rnn --n-head 2  ->  --n-head has no effect
--model linear --n-head 2  ->  --n-head has no effect
--table1 --model lstm  ->  --model has no effect
--table1 --n-embd 4  ->  --n-embd has no effect
--table1 --train full  ->  --train has no effect
--params --steps 5  ->  --steps has no effect
--params --seed 1  ->  --seed has no effect
--params --plot  ->  --plot has no effect
--params --lr 0.1  ->  --lr has no
--params --overwrite  ->  --overwrite has no effect
--params --batch-size 3  ->  --batch-size has no effect
--batch-size 0  ->  0 is not from 1
--batch-size x  ->  invalid int
--steps 0  ->  0 is not from 1
--steps 1.5  ->  invalid int
--steps -3  ->  -3 is not from 1
--lr 0
--lr -1
--lr nan
--lr inf
--lr 1e308
--weight-decay -1
--weight-decay nan
--dropout 1
--dropout -0.1
--dropout nan
--warmup 0
--warmup x
--seed -1
--seed 1.5
--seed 9223372036854775808
--n-layer 0
--n-layer 1000
--n-head 0
--n-embd 0
--n-embd 1000000
--size 0
--size x
--task imitate --target-width 0  ->  --target-width
--train nothing  ->  invalid choice
--task nothing  ->  invalid choice
--model gru  ->  invalid choice
--preset huge  ->  invalid choice
--task  ->  expected at least one
--seed  ->  expected at least
--n-embd  ->  expected at least one
--text  ->  expected one
--lr-lstm 0.1  ->  unrecognized
--eval-every 0
--dtype float64  ->  invalid choice
--device tpu
--device cuda:99
parens  ->  unrecognized
""",
    "hop_induction": """
--mpc --machines 1001  ->  --machines 1001: more than --seq-len 1000
--n-chars 101
--n-layer 0
--n-layer -1
--n-layer 2.5
--n-layer
--n-layer x
--n-layer 101
--n-head 0
--n-head 3
--n-head 4 5
--n-embd 10
--n-embd 0
--n-embd nan
--dropout 1
--dropout -0.1
--dropout nan
--dropout much
--seq-len 3
--seq-len 11
--seq-len -5
--seq-len 1e3
--n-chars 1
--n-chars 0
--max-hops 0
--max-hops 29
--max-hops -1
--n-train -1
--n-train 0.5
--n-train 100000000
--batch-size 0
--batch-size -32
--steps 0
--steps -1
--warmup 0
--warmup -3
--lr 0
--lr -1
--lr nan
--lr inf
--lr 1e308
--weight-decay -1
--weight-decay nan
--n-eval 0
--eval-every 0
--seed -1
--seed 9223372036854775808
--seed x
--arch rnn
--arch
--preset huge
--device cuda:99
--device tpu
--dtype float64
--layers 2
--n-lay 2
extra  ->  extra
--machines 4
--words 100
--arch lstm --n-head 2  ->  --n-head
--construct --plot
--construct --mpc
--construct --steps 5
--construct --out-dir x
--construct --seed 0 1
--construct --words 9
--construct --seq-len 19  ->  --seq-len 19
--construct --seq-len 501  ->  --seq-len 501
--mpc --words 1000  ->  --words 1000
--mpc --seq-len 300  ->  --words 320
--mpc --lr 1
--mpc --n-eval 5
--mpc --machines 0  ->  --machines
--mpc --n-layer 3
--mpc --arch lstm
""",
    "looped_icl": """
--n-embd 10 --n-head 4  ->  --n-embd 10 is not divisible by --n-head 4
--n-head 3  ->  not divisible
--window 5  ->  --window 5 is larger than --loops 4
--loops 1  ->  --window 2 is larger than --loops 1
--dims-start 4  ->  --dims-start 4 is above --n-dims 2
--points-start 7  ->  --points-start 7 is above --n-points 6
--n-points 3  ->  --points-start 4 is above --n-points 3
--n-points 1  ->  --n-points: 1 is not from 2
--n-points many  ->  --n-points: invalid int value: 'many'
--task openml --data-dir nowhere  ->  nowhere has 0 tables
--task openml --data-dir nowhere --held-out -1  ->  --held-out: -1 is not from 0
--task linear openml  ->  has 0 tables
--task cubic  ->  invalid choice: 'cubic'
--task  ->  --task: expected at least one argument
--model rnn  ->  invalid choice: 'rnn'
--inject subtract  ->  invalid choice: 'subtract'
--model standard --inject none  ->  has no effect on what was asked for
--model tied --window 2  ->  has no effect on what was asked for
--n-layer 3  ->  --n-layer has no effect on what was asked for
--model standard  ->  has no effect on what was asked for
--held-out 1  ->  --held-out has no effect on what was asked for
--data-dir tables  ->  --data-dir has no effect on what was asked for
--fetch 720  ->  --fetch has no effect on what was asked for
--task decision-tree --dims-start 2  ->  --dims-start has no effect on what was asked for
--points-start 6 --points-step 2  ->  --points-step has no effect on what was asked for
--points-start 6 --dims-start 2  ->  --curriculum-every has no effect on what was asked for
--window 4  ->  --loops-every has no effect on what was asked for
--steps -1  ->  --steps: -1 is not from 1
--steps 0  ->  --steps: 0 is not from 1
--steps 1.5  ->  invalid int value: '1.5'
--batch-size 0  ->  --batch-size: 0 is not from 1
--n-eval 0  ->  --n-eval: 0 is not from 1
--eval-loops 0  ->  --eval-loops: 0 is not from 1
--eval-every 0  ->  --eval-every: 0 is not from 1
--lr 0  ->  --lr: 0 is not from
--lr -1  ->  --lr: -1 is not from
--lr nan  ->  --lr: nan is not from
--lr 1e308  ->  --lr: 1e308 is not from
--warmup -1  ->  --warmup: -1 is not from 0
--schedule linear  ->  invalid choice: 'linear'
--seed -1  ->  --seed: -1 is not from 0
--seed 9223372036854775808  ->  --seed: 9223372036854775808 is not from 0
--seed  ->  --seed: expected at least one argument
--n-embd 0  ->  --n-embd: 0 is not from 1
--n-head 0  ->  --n-head: 0 is not from 1
--n-dims 0  ->  --n-dims: 0 is not from 1
--loops 0  ->  --loops: 0 is not from 1
--loops-every 0  ->  --loops-every: 0 is not from 1
--curriculum-every 0  ->  --curriculum-every: 0 is not from 1
--points-start 0  ->  --points-start: 0 is not from 1
--device tpu  ->  --device tpu
--device cuda:x  ->  --device cuda:x
--dtype float16  ->  invalid choice: 'float16'
--preset tiny  ->  invalid choice: 'tiny'
--lr-warmup 3  ->  unrecognized arguments: --lr-warmup 3
""",
    "ntp_convergence": """
--vocab-size 1
--vocab-size 0
--vocab-size -5
--vocab-size 2.5
--vocab-size nan
--vocab-size 1e9
--vocab-size 100000
--vocab-size
--vocab-size 6 8  ->  unrecognized
--seq-len 1
--seq-len 5000
--seq-len x
--n-sentences 0
--n-sentences 1000000
--steps -3
--steps 0
--steps 1e3
--steps 999999999999
--steps-ov 0
--steps-ov ''
--lr -1
--lr nan
--lr 1e308
--lr 0
--lr-ov inf
--lr-ov x
--seed -1
--seed 111111111111111111111111111111
--seed 0.5
--seed
--order none
--order
--embedding random
--weights 1
--optimizer sgd
--stages three
--preset tiny
--device mps  ->  mps
--device tpu
--device cuda:x
--dtype bfloat16
--compile
--eval-every 7
--n-layer 2
stray  ->  stray
--sentences no-such-file  ->  no-such-file
--sentences ''  ->  there is no ''
--sentences /  ->  directory
--vocab-size 4 --seq-len 50 --order total partial  ->  take shorter ones
--vocab-size 2 --n-sentences 1 --seq-len 2 --seed 0 1 2 3  ->  nothing to learn
--stages joint --steps-ov 10  ->  --steps-ov has no effect
--sentences TOKENS --vocab-size 9  ->  --vocab-size has no effect
--sentences TOKENS --order partial  ->  --order has no effect
--sentences TOKENS --n-sentences 9  ->  --n-sentences has no effect
--sentences TOKENS --seq-len 9  ->  --seq-len has no effect
--sentences BINARY  ->  decode
--embedding gaussian --vocab-size 64  ->  4,032 max-margin constraints at once: take fewer tokens
""",
    "memory_birth": """
--device cuda:99
--device abacus
--dtype int8
--preset slow
--steps 0
--steps -3
--steps many
--batch-size 0
--batch-size 1.5
--seq-len 3
--seq-len 1.5
--seq-len 1000000
--n-embd 0
--n-embd 10000000
--n-triggers 0
--n-triggers 66  ->  66 triggers
--n-triggers 5 --vocab-size 4
--vocab-size 1
--vocab-size 100000
--vocab-size 9 --text TEXT  ->  leave one out
--text no-such-file
--text EMPTY
--text LOOPS
--triggers sometimes  ->  triggers are random, fixed or fixed:OFFSET, not sometimes
--outputs none
--loss some
--model big
--model simple --n-layer 3  ->  --n-layer has no effect
--n-layer 1  ->  --n-layer has no effect
--n-head 2
--n-layer 0 --model full
--model full --n-embd 10  ->  not divisible
--model full --n-head 0  ->  --n-head
--model full --freeze wo2:3  ->  --freeze has no effect
--model full --use-wf  ->  --use-wf has no effect
--freeze wx:3
--freeze wo2
--freeze wo2:
--freeze wo2:-1
--freeze wo2:x
--freeze wo2:1:2
--freeze wo2:3,wk1:3
--freeze wf:3  ->  --use-wf
--freeze wk1:5+wk2:5+wo2:5  ->  nothing is left to train
--freeze none wk1:5+wk2:5+wo2:5
--use-wf --freeze wk1:5+wk2:5+wo2:5+wf:9  ->  nothing is left
--lr -1
--lr nan
--lr 1e308
--lr 0
--weight-decay -1
--weight-decay nan
--seed -1
--seed 99999999999999999999
--seed 1.5
--eval-every 0
--three-steps --plot
--three-steps --n-embd 135  ->  need 136
--three-steps --steps 5  ->  --steps has no effect
--three-steps --lr 0.1
--three-steps --text TEXT
--three-steps --step-logits 1 2  ->  --step-logits
--three-steps --step-logits 1 2 nan  ->  --step-logits
--three-steps --n-triggers 25  ->  25 triggers
--step-logits 1 2 3
--no-such-flag
""",
}


def inputs():
    """Pairs of a script, a line of BAD."""
    for script, lines in BAD.items():
        for line in lines.strip().splitlines():
            yield script, line


def test_there_are_enough():
    assert len(list(inputs())) >= 200


@pytest.mark.parametrize("script, line", list(inputs()))
def test_a_bad_input_is_one_line_and_writes_nothing(script, line, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "matplotlib" or find_spec(name, *rest))
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "FOLDER").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    flags, _, words = line.partition("  ->  ")
    flags = shlex.split(flags)
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(BASE.get(script, "")) + flags)
    captured = capsys.readouterr()
    error, = captured.err.splitlines()
    assert stop.value.code == 2 and "error: " in error and (words or flags[0]) in error and len(error) < 400
    assert captured.out == "" and sorted(tmp_path.rglob("*")) == before
