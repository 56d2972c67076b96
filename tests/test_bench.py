"""The benchmarks: counts, rounds, reports, and that every peer computes what ours does. No time is asserted."""

import dataclasses
import importlib.util
import io
import json

import numpy as np
import pytest
from rich.console import Console
from tiers import tiered

from experiments import __main__ as command_line
from experiments import bench
from experiments.bench import (
    attention,
    case,
    decode,
    flops,
    generate,
    heads,
    layer,
    machine,
    measure,
    models,
    report,
    start,
    step,
    timing,
)
from experiments.bench.case import Cannot, Ready, Row, Settings
from experiments.errors import UserError

KEYS = {
    "case", "pass", "causal", "batch", "length", "implementation", "milliseconds", "relative_to_ours", "gflops",
    "temporary_mib", "rounds",
}  # fmt: skip
TINY = models.Size(layers=1, d_model=12, heads=3, length=7, batch=2, vocabulary=17)
CORE = dataclasses.replace(attention.of_shapes("attention", [(2, 7, 5, 3, 4)])[0])
INSTALLED = lambda name: importlib.util.find_spec(name) is not None  # noqa: E731


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small yardstick, one round."""
    whole = machine.matmul
    monkeypatch.setattr(machine, "matmul", lambda: whole(64))
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(3, 5), (5, 3), (7, 7), (1, 11)])
def test_pairs_are_those_of_a_mask(queries, keys, causal):
    visible = np.arange(keys) <= np.arange(queries)[:, None] if causal else np.ones((queries, keys))
    assert flops.pairs(queries, keys, causal) == visible.sum()
    products = 2 * visible.sum() * 13 * 2  # q kᵀ and p v, a multiplication and an addition each
    assert flops.attention(2, 3, queries, keys, 13, causal=causal) == 6 * products
    assert flops.attention(2, 3, queries, keys, 13, causal=causal, backward=True) == 6 * products * 3.5


def test_a_layer_has_four_projections():
    for backward, core, maps in ((False, 1, 1), (True, 3.5, 3)):
        found = layer.layer_case("layer", 2, 5, False, backward, d_model=12, heads=3).flops
        assert found == core * 4 * 2 * 3 * 4 * 5 * 5 + maps * 4 * 2 * (2 * 5) * 12 * 12


@pytest.mark.slow
def test_every_round_calls_everybody_in_another_order():
    orders = [timing.order("abcd", number) for number in range(4)]
    assert all(sorted(names) == list("abcd") for names in orders)
    assert len(set(map(tuple, orders))) == 4
    called = []
    functions = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times, _ = timing.interleave(functions, 0.0, warm=False)
    assert sorted(called) == ["a", "b"] and {len(t) for t in times.values()} == {1}


def test_a_ratio_is_taken_within_a_round():
    """A machine that is ten times slower in two of three rounds changes every time, but no ratio."""
    ours, theirs = np.array([1.0, 10, 10]), np.array([2.0, 20, 20])
    assert timing.ratio(theirs, ours) == 2
    assert timing.summary(np.array([1.0, 2, 3, 4, 9])) == (3, 1, 5)


def agree(rows):
    """Everybody was timed, or has a reason that is not a wrong or failing computation."""
    for row in rows:
        excuse = row.note is not None and row.note.startswith(("not installed", "has no "))
        assert excuse or (row.note is None and row.rounds == 1), (row.implementation, row.note)
    timed = {row.implementation for row in rows if row.note is None}
    assert timed >= {"ours", "linen", "nnx"}
    return timed


@pytest.mark.slow
@pytest.mark.parametrize("causal, backward", tiered([(True, False), (True, True)], (True, True)))
def test_every_peer_computes_attention(quick_compiles, causal, backward):
    shape = dataclasses.replace(CORE, causal=causal, backward=backward)
    timed = agree(attention.rows(shape, list(attention.BUILDERS), Settings(0.0)))
    assert timed >= {"jax.nn", "plain"} and ("torch" in timed) == INSTALLED("torch")


@pytest.mark.slow
@pytest.mark.parametrize("causal, backward", tiered([(True, False), (False, True)], (True, False)))
def test_every_peer_computes_the_layer(quick_compiles, causal, backward):
    shape = layer.layer_case("layer", 2, 7, causal, backward, d_model=12, heads=3)
    timed = agree(layer.rows(shape, list(layer.BUILDERS), Settings(0.0)))
    assert timed >= {"jax.nn", "vmap"} and ("torch-mha" in timed) == INSTALLED("torch")


@pytest.mark.slow
def test_every_peer_decodes(quick_compiles):
    shape = dataclasses.replace(CORE, batch=2, length=1, keys=5, heads=3, width=4, d_model=12)
    agree(decode.rows(shape, list(decode.BUILDERS), Settings(0.0)))


@pytest.mark.slow
def test_every_peer_writes_the_same_text(quick_compiles):
    rows = {row.implementation: row for row in generate.of_size(TINY, list(generate.BUILDERS), Settings(0.0))}
    assert rows["ours"].rounds == rows["linen"].rounds == 1
    assert rows["torch"].rounds == INSTALLED("torch") and (rows["torch"].note is None) == INSTALLED("torch")


@pytest.mark.slow
def test_what_is_done_with_heads_agrees(quick_compiles, monkeypatch):
    monkeypatch.setattr(heads, "LAYERS", 2)
    for shape, others in (
        (heads.ablation_case(5, 12, 2, heads=3), {"lifted", "loop"}),
        (heads.half_case(7, 12, 2, heads=6), {"all-heads"}),
        (heads.capture_case(9, 12, 1, heads=3), {"rows", "plain"}),
    ):
        rows = heads.rows(shape, list(heads.BUILDERS), Settings(0.0))
        assert {row.implementation for row in rows} == {"ours", *others}
        assert {row.note for row in rows} == {None}, [row.note for row in rows]


def answering(*arrays):
    return lambda case: Ready(lambda: None, lambda: list(arrays))


def raising(error):
    def build(case):
        raise error

    return build


def test_only_what_agrees_is_timed():
    right = np.array([1.0, -4.0])
    builders = {
        "ours": answering(right),
        "right": answering(right * (1 + 1e-5)),
        "wrong": answering(right + np.array([0.0, 0.01])),
        "nan": answering(right * np.nan),
        "shape": answering(right[None]),
        "absent": raising(ImportError("No module named 'absent'")),
        "unable": raising(Cannot("has no function for it")),
        "broken": raising(RuntimeError("first line\nsecond")),
    }
    rows = {row.implementation: row for row in measure.measure(CORE, builders, 0.0)}
    assert list(rows) == list(builders)
    assert {name for name, row in rows.items() if row.milliseconds is not None} == {"ours", "right"}
    assert {name for name, row in rows.items() if (row.note or "").startswith("WRONG")} == {"wrong", "nan", "shape"}
    assert rows["absent"].note == "not installed: No module named 'absent'"
    assert rows["unable"].note == "has no function for it"
    assert rows["broken"].note == "fails: RuntimeError: first line"


def test_what_does_not_fit_in_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: -1)
    with pytest.raises(Cannot, match="more than the machine has left"):
        attention.BUILDERS["ours"](CORE)


def test_a_table_fits_in_eighty_columns_and_gives_reasons():
    wide = {"tokens_per_second": 123_456.0, "peak_mib": 12_345.0, "import_mib": None}
    numbers = {"milliseconds": 12_345.6, "relative_to_ours": 12.3, "spread": 1_234.5, "matmul_fraction": 1.0}
    file = io.StringIO()
    for peer, more in (("tokamax-chunked", {"temporary": 2**33}), ("linen", {"extra": wide})):  # of a step
        rows = [Row(case=CORE, implementation=n, rounds=7, **numbers, **more) for n in ("ours", peer)]
        report.show(
            Console(file=file, width=80), [*rows, Row(case=CORE, implementation="torch", note="WRONG: [1] differs")]
        )
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "12,346" in text and "8,192.0" in text and "123,456" in text
    assert "torch: WRONG: [1] differs" in text


@pytest.mark.slow
def test_json_has_the_promised_keys(capsys):
    asked = ["bench", "attention", "--lengths", "8", "--pass", "forward", "--causal", "yes", "--seconds", "1e-9"]
    assert command_line.main([*asked, "--only", "jax.nn", "--json"]) == 0
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["implementation"] for record in records] == ["ours", "jax.nn"]
    for record in records:
        assert record.keys() >= KEYS and record["case"] == "attention" and record["pass"] == "forward"
        assert record["causal"] is True and record["length"] == 8
        assert record["gflops"] == pytest.approx(4 * record["batch"] * 8 * 64 * 36 / record["milliseconds"] / 1e6)
    assert "threads" in err and "host.keep_memory: off" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["attention", "--only", "tokamax"], ["tokamax-xla", "jax.nn", "torch", "'tokamax'", "did you mean tokamax-"]),
        (["decode", "--only", "vmap"], ["linen", "torch", "'vmap'"]),
        (["layer", "--seconds", "0"], ["--seconds", "above 0"]),
        (["layer", "--lengths", "0"], ["--lengths", "at least 1"]),
        (["odd", "--lengths", "128"], ["1000", "37", "512"]),
    ],
)
def test_a_mistake_is_told(arguments, words):
    with pytest.raises(UserError) as told:
        bench.command(arguments)
    assert [word for word in words if word not in str(told.value)] == []


@pytest.mark.slow
def test_models_are_the_same(quick_compiles):
    """In this process, without optimisation: the losses of two steps."""
    import jax

    from experiments.bench import worker

    arrays, losses = models.arrays(TINY), {}
    for kind in ("ours", "linen", "nnx"):
        program, state = worker.jax_program(kind, TINY)(arrays)
        program, losses[kind] = jax.jit(program), []
        for _ in range(2):
            loss, state = program(state, arrays["tokens"])
            losses[kind].append(float(loss))
        assert losses[kind] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["ours"][1] < losses["ours"][0]


@pytest.mark.slow
def test_a_training_step_is_measured_in_processes_of_their_own(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    rows = step.of_size(TINY, ["ours", "torch"], Settings(0.0))
    ours, torch = rows
    assert ours.extra is not None and ours.rounds == 1 and ours.extra["tokens_per_second"] > 0
    assert ours.extra["peak_mib"] is None or ours.extra["peak_mib"] > ours.extra["import_mib"] > 10
    assert torch.note is None if INSTALLED("torch") else torch.note.startswith("not installed")


def test_a_process_that_ends_is_a_reason(tmp_path):
    with pytest.raises(Cannot, match="fails: .*size.json"):
        step.Worker("ours", tmp_path, False)


@pytest.mark.slow
def test_imports_and_compilations_are_timed():
    imports, layers, _ = start.cases([5])
    (row,) = start.rows(imports, ["ours"], Settings(0.0))
    assert row.note is None and row.gflops is None
    small = dataclasses.replace(layers, d_model=12, heads=3, width=4)
    rows = start.rows(small, ["ours", "jax"], Settings(0.0))
    assert [row.note for row in rows] == [None, "has no layer of its own to compile"]
    assert case.OURS == rows[0].implementation
