"""Families of models: what their config.json asks, and where their tensors stand in our parameters.

Each exports MODEL (the module of ours that computes it), TYPES (the `model_type`s that it reads), `read_config(source,
length)`, `leaves(source, config)`, IGNORED (patterns of tensors that nobody needs) and CONSTANTS (leaves that the files
do not hold, with their value). A new one is a file and a row here.
"""

from mhajax.pretrained.families import bert, gpt2, gpt_neox, llama

FAMILIES = {kind: family for family in (bert, gpt2, gpt_neox, llama) for kind in family.TYPES}
