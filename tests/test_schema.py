"""Config files: what is accepted, what comes back, and what a user is told who gets it wrong."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Literal

import pytest

from experiments import schema, toml
from experiments.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Grammar:
    kind: Literal["grammar"] = "grammar"
    depth: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    kind: Literal["text"] = "text"
    root: str
    languages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    d_model: int
    num_heads: int = 4
    norm: Literal["rms", "layer"] = "rms"
    dropout: float | None = None
    bias: bool = False
    widths: tuple[int, ...] = (3, 5)

    def __post_init__(self):
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads={self.num_heads}, got {self.d_model}.")


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    learning_rate: float = 1e-3
    steps: int = 100
    stages: tuple[Stage, ...] = ()


@dataclasses.dataclass(frozen=True)
class Common:
    name: str = "run"
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Common):
    model: Model
    data: Grammar | Text
    training: Training = Training(learning_rate=0.5)
    probe: Model | None = None
    factor: Literal[1, 2, "auto"] = 1


GOOD = """\
seed = 7
[model]
d_model = 60
num_heads = 4
[data]
kind = "grammar"
"""


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "run.toml"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# Accepted


def test_every_type(write):
    text = """
name = "a \\"b\\" \\u00e9 \\\\"
factor = "auto"
[model]
d_model = 60
norm = "layer"
dropout = 1
bias = true
widths = [7, 11]
[probe]
d_model = 8
[data]
kind = "text"
root = "corpus"
languages = ["en", "de"]
[training]
stages = [{steps = 2}, {steps = 3, note = "long"}]
"""
    config = schema.read(write(text), Config)
    assert config == Config(
        name='a "b" é \\',
        factor="auto",
        model=Model(60, norm="layer", dropout=1.0, bias=True, widths=(7, 11)),
        probe=Model(8),
        data=Text(root="corpus", languages=("en", "de")),
        training=Training(learning_rate=0.5, stages=(Stage(2), Stage(3, "long"))),
    )
    assert type(config.model.dropout) is float
    assert hash(config) == hash(dataclasses.replace(config))


def test_missing_tables_and_keys_give_defaults(write):
    config = schema.read(write(GOOD), Config)
    assert config == Config(seed=7, model=Model(60), data=Grammar())
    assert schema.build({}, Training) == Training()


def test_a_partial_table_keeps_the_rest_of_the_default_instance(write):
    config = schema.read(write(GOOD), Config, ["training.steps=9"])
    assert config.training == Training(learning_rate=0.5, steps=9)


def test_byte_order_mark_and_windows_line_ends(write):
    content = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert schema.read(write(content), Config).seed == 7


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_heads=5"], Model(60, 5)),
        (["model.num_heads=5", "model.num_heads = 6"], Model(60, 6)),
        (["model={d_model=8}"], Model(8)),
        (["model={d_model=8}", "model.num_heads=2"], Model(8, 2)),
        (["model.num_heads=2", "model={d_model=8}"], Model(8)),
        (["model.dropout=0.25", "model.widths=[]"], Model(60, dropout=0.25, widths=())),
        (['model.norm="layer" # comment'], Model(60, norm="layer")),
        (["model.norm=layer"], Model(60, norm="layer")),
    ],
)
def test_overrides(write, overrides, expected):
    assert schema.read(write(GOOD), Config, overrides).model == expected


def test_unquoted_text_in_overrides(write):
    overrides = ['data={kind="text", root="x"}', "data.root=/tmp/a b=c", "name=a-b"]
    config = schema.read(write(GOOD), Config, overrides)
    assert (config.data, config.name) == (Text(root="/tmp/a b=c"), "a-b")
    assert type(config.name) is str


def test_merge_leaves_its_argument_alone():
    table = {"model": {"num_heads": 4}}
    assert toml.merge(table, ["model.num_heads=8", "seed=1"]) == {"model": {"num_heads": 8}, "seed": 1}
    assert table == {"model": {"num_heads": 4}}


@pytest.mark.parametrize(
    "config",
    [
        Config(model=Model(60), data=Grammar()),
        Config(
            model=Model(60, dropout=1e-30, bias=True, widths=()), data=Text(root="C:\\x\n\t\x7f'\"é"), factor="auto"
        ),
        Config(model=Model(60), probe=Model(8, dropout=1e22), data=Text(root="", languages=("a", '"'))),
        Config(model=Model(60), data=Grammar(), training=Training(stages=(Stage(1), Stage(2, "x]")))),
        Training(learning_rate=0.1 + 0.2, steps=-(2**62)),
    ],
)
def test_round_trip(config):
    text = schema.to_toml(config)
    again = schema.build(tomllib.loads(text), type(config))
    assert again == config
    assert schema.to_toml(again) == text


def test_the_kind_may_choose_the_whole_schema(write):
    assert schema.read(write('kind = "text"\nroot = "x"\n'), Grammar | Text) == Text(root="x")
    with pytest.raises(ConfigError, match='kind is missing: .*; write kind = "grammar" or kind = "text"'):
        schema.read(write('root = "x"\n'), Grammar | Text)
    with pytest.raises(ConfigError, match='did you mean "grammar"?'):
        schema.read(write('kind = "gramar"\n'), Grammar | Text)


def test_to_toml_text():
    assert schema.to_toml(Config(model=Model(60), data=Grammar(), training=Training(stages=(Stage(2),)))) == (
        'name = "run"\nseed = 0\nfactor = 1\n\n'
        '[model]\nd_model = 60\nnum_heads = 4\nnorm = "rms"\nbias = false\nwidths = [3, 5]\n\n'
        '[data]\nkind = "grammar"\ndepth = 3\n\n'
        "[training]\nlearning_rate = 0.001\nsteps = 100\nstages = [{steps = 2}]\n"
    )


# Refused

BAD_FILES = [
    # text of the file, parts of the message
    ("learning_rate = 0.1\n" + GOOD, ["learning_rate = 0.1", "learning_rate belongs to [training]"]),
    (GOOD + "[training]\nseed = 3\n", ["training.seed = 3", "seed belongs to the top of the file"]),
    (GOOD.replace("num_heads", "num_head"), ["model.num_head = 4 is not a known key", "did you mean num_heads?"]),
    (GOOD + "[trainig]\nsteps = 1\n", ["[trainig] is not a known table", "did you mean training?"]),
    (GOOD + 'root = "x"\n', ['data.root = "x"', 'root belongs to [data] with kind = "text"']),
    (GOOD + "zzz = 1\n", ["data.zzz = 1", "The keys of [data] are kind, depth."]),
    (GOOD + "dept = 1\nzzz = 2\n", ["2 unknown keys", "data.dept = 1", "did you mean depth?", "data.zzz = 2"]),
    (GOOD + "learnin_rat = 1\n", ["did you mean learning_rate, which belongs to [training]?"]),
    (GOOD + "[training]\nstages = [{steps = 1, not = 'x'}]", ["training.stages[0].not", "did you mean note?"]),
    ('[data]\nkind = "grammar"\n', ["model.d_model is missing", "a whole number", "d_model = 8 in [model]"]),
    ("[model]\nd_model = 60\n", ["the table [data] is missing", '"grammar" or "text"']),
    ("[model]\nd_model = 60\n[data]\ndepth = 1", ["data.kind is missing", 'kind = "grammar" or kind = "text"']),
    (GOOD.replace("grammar", "txt"), ["data.kind", '"grammar" or "text"', '"txt"', 'did you mean "text"?']),
    (GOOD.replace("= 60", '= "60"'), ["model.d_model must be a whole number", 'string "60"', "write d_model = 60"]),
    (GOOD.replace("= 60", "= 60.0"), ["must be a whole number", "got the float 60.0", "write d_model = 60"]),
    (GOOD.replace("= 60", "= 60.5"), ["must be a whole number", "got the float 60.5", "an example: d_model = 8"]),
    (GOOD.replace("= 60", "= true"), ["must be a whole number", "got the boolean true"]),
    (GOOD.replace("= 60", "= 2024-01-01"), ["must be a whole number", "got the date or time 2024-01-01"]),
    (GOOD.replace("d_model = 60", "d_model = {a = 1}"), ["model.d_model must be a whole number", "the table {a = 1}"]),
    ("model = 3\n", ["model must be a table", "got the integer 3", "write [model]"]),
    ("[[model]]\nd_model = 60\n", ["model must be a table", "got the array [{d_model = 60}]"]),
    (GOOD.replace("seed = 7", "name = 7"), ["name must be text in quotes", "the integer 7", 'write name = "7"']),
    (GOOD.replace("seed = 7", "factor = 3"), ['factor must be one of 1, 2 or "auto"', "got the integer 3"]),
    (GOOD.replace("seed = 7", "factor = true"), ['one of 1, 2 or "auto"', "got the boolean true"]),
    (GOOD.replace("seed = 7", 'factor = "2"'), ['got the string "2"', "write factor = 2"]),
    (GOOD + "[training]\nlearning_rate = nan\n", ["training.learning_rate must be a finite number", "float nan"]),
    (GOOD + "[training]\nlearning_rate = 1e999\n", ["training.learning_rate must be a finite number", "float inf"]),
    (GOOD + "[training]\nlearning_rate = '0.1'\n", ["must be a number", 'string "0.1"', "write learning_rate = 0.1"]),
    (GOOD + "[training]\nstages = 1\n", ["training.stages must be an array", "got the integer 1"]),
    (GOOD + "[training]\nstages = [{}]\n", ["training.stages[0].steps is missing"]),
    (GOOD.replace("num_heads = 4", "num_heads = 7"), ["[model] d_model must be a multiple of num_heads=7, got 60."]),
    (GOOD.replace("num_heads = 4", 'widths = [1, "2"]'), ["model.widths[1] must be a whole number", "write 2"]),
    (GOOD.replace("num_heads = 4", "widths = 3"), ["model.widths must be an array", "write widths = [3]"]),
    (GOOD.replace("num_heads = 4", "bias = 1"), ["model.bias must be true or false", "write bias = true"]),
    (GOOD.replace("num_heads = 4", 'dropout = "none"'), ["model.dropout must be a number", "leave the key out"]),
    ("seed = 1\n\tname = hello\n", ["line 2, column 9", "not valid TOML", "text needs quotes", "2 | \tname = hello"]),
    ("[model\n", ["line 1, column 7", "not valid TOML", "1 | [model"]),
    ("seed = 1\nseed = 2\n", ["line 2", "not valid TOML", "2 | seed = 2"]),
    ('name = """abc', ["line 1, column 14", "not valid TOML"]),
    ("seed = " + "[" * 100_000, ["not valid TOML"]),
    (b"name = '\xff'\n", ["not UTF-8", "byte 0xff in line 1", "save it again as UTF-8"]),
    (b"PK\x03\x04\x00\x00", ["binary file"]),
]


@pytest.mark.parametrize(("content", "parts"), BAD_FILES)
def test_bad_files(write, content, parts):
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        schema.read(path, Config)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_the_caret_stands_under_the_column(write):
    with pytest.raises(ConfigError) as caught:
        schema.read(write("seed = 1\n\tname = hello\n"), Config)
    assert str(caught.value).splitlines()[1:] == ["  2 | \tname = hello", "    | \t       ^"]


BAD_OVERRIDES = [
    ("model.num_heads", ["this is not key=value"]),
    ("=3", ["this is not key=value"]),
    ("model num_heads=3", ["this is not key=value"]),
    ("seed=1\nname=2", ["this is not key=value"]),
    ("name=", ["the value is missing", "'name=\"\"'"]),
    ("seed.x=1", ["seed is the integer 7, not a table", "override seed as a whole"]),
    ("model.num_head=8", ["model.num_head = 8", "did you mean num_heads?"]),
    ("model.num_heads=eight", ["model.num_heads must be a whole number", "the unquoted text eight"]),
    ("model.bias=True", ["true or false", "the unquoted text True", "write 'model.bias=true'"]),
    ("model.dropout=.5", ["must be a number", "write 'model.dropout=0.5'"]),
    ("model.dropout=None", ["TOML has no null", "leave the key out"]),
    ("model.widths=1,2", ["write 'model.widths=[1,2]'"]),
    ("model.norm=layr", ["the unquoted text layr", 'did you mean "layer"?']),
    ("model.norm=layr", ['did you mean "layer"?']),
    ("model.num_heads=7", ["[model] d_model must be a multiple of num_heads=7"]),
    ("model=7", ["model must be a table", "got the integer 7"]),
    ("name=8", ["must be text in quotes", """write 'name="8"'"""]),
    ('name="a', ["must be text in quotes", """write 'name="a"'"""]),
    ('name="C:\\Users"', ["must be text in quotes", """write 'name="C:\\\\Users"'"""]),
    ('data={kind="text", root="x", languages=[en]}', ["data must be a table", "unquoted text"]),
    ('data={kind="text", root="x", languages="en"}', ["data.languages must be an array", '["en"]']),
    ("training.stages=[{steps=1.5}]", ["training.stages[0].steps must be a whole number", "float 1.5"]),
]


@pytest.mark.parametrize(("override", "parts"), BAD_OVERRIDES)
def test_bad_overrides_name_the_file_and_the_override(write, override, parts):
    path = write(GOOD)
    with pytest.raises(ConfigError) as caught:
        schema.read(path, Config, [override])
    for part in [str(path), f"override {override!r}", *parts]:
        assert part in str(caught.value)


def test_an_error_of_the_file_does_not_blame_an_override(write):
    with pytest.raises(ConfigError) as caught:
        schema.read(write(GOOD.replace("= 60", "= 6.5")), Config, ["seed=3", "model.num_heads=2"])
    assert "override" not in str(caught.value)


def test_a_missing_file(write, tmp_path):
    write(GOOD, "grammar.toml")
    for name, parts in [
        ("gramar.toml", ["no such file", f"did you mean {tmp_path / 'grammar.toml'}?"]),
        ("grammar", ["no such file", f"did you mean {tmp_path / 'grammar.toml'}?"]),
        ("zzz", [f"no such file in {tmp_path}"]),
        ("nowhere/a.toml", ["no such file", f"no folder {tmp_path / 'nowhere'}"]),
        ("", ["this is a folder", "it holds grammar.toml"]),
        ("x" * 5000, ["cannot be read"]),
    ]:
        with pytest.raises(ConfigError) as caught:
            schema.read(tmp_path / name, Config)
        for part in parts:
            assert part in str(caught.value)


def test_build_names_where():
    with pytest.raises(ConfigError, match=r"^checkpoint: steps must be a whole number"):
        schema.build({"steps": "x"}, Training, where="checkpoint")


# Mistakes of the programmer, not of the user


@dataclasses.dataclass(frozen=True)
class NotNone:
    dropout: float | None = 0.1


@dataclasses.dataclass(frozen=True)
class Unsupported:
    value: int | str = 0


@dataclasses.dataclass(frozen=True)
class WithoutKind:
    data: Grammar | Stage


def test_to_toml_refuses_what_would_not_come_back():
    with pytest.raises(ValueError, match="needs None as its default"):
        schema.to_toml(NotNone(None))
    with pytest.raises(ConfigError, match="finite"):
        schema.to_toml(Training(learning_rate=float("nan")))
    with pytest.raises(ValueError, match="must be bool, int"):
        schema.to_toml(Training(steps=object()))  # type: ignore


@pytest.mark.parametrize("bad", [Unsupported, WithoutKind, int])
def test_a_schema_that_cannot_be_read_is_refused_at_once(bad):
    with pytest.raises(TypeError, match="schema"):
        schema.build({}, bad)
