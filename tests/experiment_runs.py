"""Tiny experiments, and the command line in this process."""

import contextlib
import io
import sys
from pathlib import Path

from experiments.__main__ import main

REPOSITORY = Path(__file__).parent.parent
TINY = """
kind = "translation"
[data]
kind = "grammar"
train = 150
validation = 12
test = 14
generalisation = 10
[vocabulary]
kind = "words"
[batches]
tokens = 256
boundaries = [32]
[model]
d_model = 16
num_heads = 2
encoder_layers = 1
decoder_layers = 2
dropout = 0.1
[training]
steps = 12
warmup_steps = 2
log_every = 2
evaluate_every = 6
checkpoint_every = 4
average_decay = 0.9
[decoding]
beams = 1
batch = 14
validation_sentences = 8
"""
TINY_TEXT = """
kind = "language_model"
[data]
kind = "text"
path = "{path}"
[batches]
size = 4
length = 16
[model]
d_model = 16
num_heads = 2
num_layers = 2
[training]
steps = 8
warmup_steps = 2
log_every = 2
evaluate_every = 4
checkpoint_every = 2
average_decay = 0.9
[sampling]
prompt = "a"
tokens = 9
"""


def call(*arguments, stdin=""):
    """Run the command line in this process: (exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    finally:
        sys.stdin = before
    return status, out.getvalue(), err.getvalue()
