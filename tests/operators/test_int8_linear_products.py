"""int8_linear's products on a CPU: which of PyTorch's operators a process tries and takes, and that they are right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from checking import same_bits
from int8_linear_calls import judge, tensors_of, weight_of
from torch.fx.experimental.proxy_tensor import make_fx

from gptkern import functional as F
from gptkern.commands import info
from gptkern.operators.int8_linear import products

# --- What is tried, in processes of their own -----------------------------------------------------------------------

# What the trial decided, beside what torch._int_mm gives here; then products of every class of shapes, bit for bit.
PROGRAM = """
import json
import math
import torch
torch.set_num_threads(1)
import gptkern.functional as F
from gptkern.operators.int8_linear import products
at_import = len(products._trials)
products.integer_trial(math.inf)

def is_exact(product, rows, terms, outputs, left, right):
    q = torch.full((rows, terms), left, dtype=torch.int8)
    weight = torch.full((outputs, terms), right, dtype=torch.int8)
    return torch.equal(product(q, weight).long(), torch.full((rows, outputs), left * right * terms))

shapes = [(rows, terms, outputs) for rows in (1, 2, 17, 40) for terms in (16, 65, 768, 1100) for outputs in (1, 33, 64)]
ends = [(127, 127), (127, -128), (-127, 127), (-127, -128)]
plain = lambda q, weight: torch._int_mm(q, weight.t())
exact = all(is_exact(plain, *shape, *end) for shape in shapes for end in ends)
ours = all(is_exact(products.integer_product, *shape, *end) for shape in shapes for end in ends)
for rows, terms, outputs in shapes:
    q = torch.randint(-127, 128, (rows, terms), dtype=torch.int8)
    q[:, 0] = 127
    weight = torch.randint(-128, 128, (outputs, terms), dtype=torch.int8)
    for laid in (weight, weight.t().contiguous().t(), weight.repeat(1, 2)[:, :terms]):
        result = F.int8_linear(q.float(), laid, torch.ones(outputs), mode="w8a8")
        ours = ours and torch.equal(result, (q.long() @ weight.long().t()).float())
few, many, reason = products.integer_trial()
print(json.dumps({"at_import": at_import, "exact": exact, "ours": ours, "few": few, "many": many, "reason": reason}))
"""


def tried_in(environment: dict[str, str]) -> dict:
    known = {name: value for name, value in os.environ.items() if name not in ("ONEDNN_MAX_CPU_ISA", "GPTKERN_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=known | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},  # hides VNNI, of which torch.cpu knows nothing
        *(
            pytest.param({"ONEDNN_MAX_CPU_ISA": isa}, marks=pytest.mark.deep)
            for isa in ("SSE41", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
        ),
        *(pytest.param({"ATEN_CPU_CAPABILITY": name}, marks=pytest.mark.deep) for name in ("default", "avx2")),
    ],
    ids=str,
)
def test_int_mm_is_taken_where_it_is_exact_and_nowhere_else(environment):
    found = tried_in(environment)
    assert found["at_import"] == 0, "an import tries nothing"
    assert found["ours"], "gptkern's own product is exact either way"
    taken = {found["few"], found["many"]}
    assert taken <= {products.FLOATS, products.INT_MM}
    assert found["exact"] or taken == {products.FLOATS}, found["reason"]
    assert found["exact"] is ("not exact" not in found["reason"])


# --- The products themselves ----------------------------------------------------------------------------------------

INTEGER = [products._product_of_floats, products.integer_product_here]


@pytest.fixture
def untried(monkeypatch):
    """As in a process that has tried nothing."""
    monkeypatch.setattr(products, "_trials", {})
    monkeypatch.setattr(products, "_unfinished", {})
    return products._trials


def found_by(steps):
    """What a trial's steps return."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def exact_here(product):
    if product is products.integer_product_here and products.INT_MM not in products.integer_trial(math.inf)[:2]:
        pytest.skip("torch._int_mm is not exact here, or slow: the trial refuses it")


@pytest.mark.parametrize("product", INTEGER)
@pytest.mark.parametrize("shape", [(1, 16, 1), (1, 31, 65), (2, 1100, 33), (17, 129, 1), (64, 4097, 7)], ids=str)
def test_strides_of_single_rows_and_columns(product, shape):
    # PyTorch calls any stride of a size 1 contiguous; torch._int_mm left its result unwritten for most of them.
    exact_here(product)
    rows, terms, outputs = shape
    memory = torch.randint(-127, 128, (rows * terms + outputs * terms + terms,)).to(torch.int8)
    for step in (1, 3, terms, 1000):
        q = memory.as_strided((rows, terms), (step if rows == 1 else terms, 1))
        weight = memory.as_strided((outputs, terms), (step if outputs == 1 else terms, 1), rows * terms)
        for laid in (weight, weight.t().contiguous().t()):
            assert torch.equal(product(q, laid).long(), q.long() @ weight.long().t())


@pytest.mark.parametrize(
    ("magnitudes", "chunks"),
    [
        ([(127, 1032), (8, 1), (0, 3063)], [4096]),  # 2^17, all that fits
        ([(127, 1032), (9, 1), (0, 3063)], [1024, 3072]),
        ([(0, 3063), (9, 1), (127, 1032)], [3072, 1024]),
        ([(32, 4096)], [4096]),
        ([(33, 4096)], [3072, 1024]),
        ([(127, 2048), (0, 2047), (1, 1)], [1024, 1024 + 2048]),
        ([(127, 1024)], [1024]),
        ([(1, 131_072), (1, 1)], [131_072, 1]),
    ],
    ids=str,
)
def test_longer_sums_where_the_row_lets_them_be_exact(magnitudes, chunks):
    row = torch.cat([torch.full((terms,), float(value)) for value, terms in magnitudes])
    terms = len(row)
    # What the last term adds is odd, and float32 holds no odd number beyond 2^24.
    weight = torch.cat([torch.full((1, terms), -128), torch.full((1, terms), 127)]).to(torch.int8)
    weight[:, -1] = torch.tensor([-127, 125])
    for x in (row[None], -row[None], torch.stack([torch.zeros(terms), row, row.clamp(max=1)])):
        found = products._exact_chunks(x, weight, terms)
        assert [len(range(terms)[chunk]) for chunk in found] == chunks
        result = products._product_of_floats(x.to(torch.int8), weight)
        assert torch.equal(result.long(), x.long() @ weight.long().t())
    # Each row is small enough, and both in the same chunk are.
    apart = torch.zeros(2, 2048)
    apart[0, :1024], apart[1, 1024:] = 127, 127
    assert len(products._exact_chunks(apart, weight, 2048)) == 1


def test_a_product_that_saturates_or_loses_a_term_is_not_taken(untried, monkeypatch):
    def saturating(q, weight):
        pairs = (q.long()[:, None] * weight.long()).unfold(-1, 2, 2).sum(-1)
        rest = (q.long()[:, None] * weight.long())[..., q.shape[1] // 2 * 2 :].sum(-1)
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(-1) + rest).int()

    for wrong in (saturating, lambda q, weight: torch._int_mm(q[:, :64], weight[:, :64].t().contiguous())):
        untried.clear()
        monkeypatch.setattr(products, "integer_product_here", wrong)
        assert products.integer_trial(math.inf) == ("float32", "float32", "torch._int_mm is not exact here")


def test_a_bfloat16_product_that_is_wrong_is_not_taken():
    right = products._BFLOAT16_PRODUCTS[products.FLOATS]
    assert found_by(products._why_not(right)) is None
    assert found_by(products._why_not(lambda x, weight: right(x, weight).to(torch.bfloat16))) is None
    wrong = {
        "rounded twice as coarsely": lambda x, weight: right(x, weight).mul(4.03).to(torch.bfloat16).float() / 4,
        "summed in bfloat16": lambda x, weight: sum(
            (x[:, [k]] * weight[:, k].to(x.dtype) for k in range(x.shape[1])), torch.zeros((), dtype=x.dtype)
        ),
        "without its first term": lambda x, weight: right(x[:, 1:], weight[:, 1:]),
    }
    for what, product in wrong.items():
        assert found_by(products._why_not(product)) == "is wrong here", what
    assert found_by(products._why_not(lambda x, weight: right(x.nan_to_num(), weight))) == "loses a NaN here"


@pytest.mark.parametrize("name", [products.FLOATS, products.PACKED, products.BFLOAT16])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_every_bfloat16_product_is_within_the_rule(untried, name, activation):
    if found_by(products._why_not(products._BFLOAT16_PRODUCTS[name])) is not None:
        pytest.skip(f"{name} is wrong on this CPU: the trial refuses it")
    untried["bfloat16", True] = products.Trial(name, name, "asked for by a test")
    for rows, terms, outputs in ((1, 64, 7), (3, 768, 33), (40, 160, 65)):
        for bias_dtype in (torch.bfloat16, torch.float32):
            tensors = tensors_of(rows, terms, outputs, torch.bfloat16, "cpu", bias_dtype)
            judge(*tensors, activation=activation, mode="w8a16")
    judge(*tensors[:3], None, activation=activation, mode="w8a16")


def test_scratch_memory_is_a_thread_s_own_and_taken_in_any_mode():
    layers = [(torch.randn(40, 768), *weight_of(1500, 768, "cpu")) for _ in range(4)]
    wrong: list = []

    def run(x, weight, scale):
        expected = x.double() @ weight.double().t() * scale.double()
        with torch.inference_mode():  # the thread's first call
            F.int8_linear(x, weight, scale, mode="w8a16")
        for _ in range(20):
            result = F.int8_linear(x, weight, scale, mode="w8a16")
            if not torch.allclose(result.double(), expected, rtol=1e-4, atol=1e-4):
                wrong.append(result)
        leaf = x.clone().requires_grad_()
        F.int8_linear(leaf, weight, scale, mode="w8a16").sum().backward()
        torch.testing.assert_close(leaf.grad[0], (weight.double() * scale.double()[:, None]).sum(0).float())
        done.append(x)

    done: list = []
    threads = [threading.Thread(target=run, args=layer) for layer in layers]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(done) == 4 and not wrong


# --- When it is tried -----------------------------------------------------------------------------------------------


def a_call(rows=3, dtype=torch.float32):
    q = torch.randint(-127, 128, (rows, 96))
    q[:, 0] = 127
    weight, _ = weight_of(40, 96, "cpu")
    return q.to(dtype), weight, torch.ones(40), (q @ weight.long().t()).to(dtype)


def test_the_first_calls_of_many_threads_try_once(untried, monkeypatch):
    times = []

    def steps():
        times.append(threading.get_ident())
        time.sleep(0.02)
        yield
        return products.Trial(products.FLOATS, products.FLOATS, "made up")

    monkeypatch.setattr(products, "_try_integer", steps)
    x, weight, scale, expected = a_call()
    start, results = threading.Barrier(6), []

    def run():
        start.wait()
        results.append(F.int8_linear(x, weight, scale, mode="w8a8"))

    threads = [threading.Thread(target=run) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(times) == 1 and len(results) == 6
    for result in results:
        same_bits("product", result, expected)


def test_nothing_is_tried_while_something_looks_on(untried):
    x, weight, scale, expected = a_call()

    def call(x):
        return F.int8_linear(x, weight, scale, mode="w8a8")

    same_bits("vmap", torch.func.vmap(call)(x[:, None])[:, 0], expected)
    same_bits("jvp", torch.func.jvp(call, (x,), (x,))[0], expected)
    same_bits("make_fx", make_fx(call)(x)(x), expected)
    same_bits("torch.jit.trace", torch.jit.trace(call, x, check_trace=False)(x), expected)
    with torch._subclasses.FakeTensorMode() as mode:
        assert F.int8_linear(*map(mode.from_tensor, (x, weight, scale)), mode="w8a8").shape == expected.shape

    class Layer(torch.nn.Module):
        def forward(self, x):
            return call(x)

    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(Layer(), (x,), strict=strict)
        same_bits("torch.export", program.module()(x), expected)
        # It may run on another CPU.
        assert not {"int8_linear_forward", "_int_mm"} & {
            node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function"
        }
    assert not untried


def test_a_compiled_graph_asks_when_it_runs(untried):
    x, weight, scale, expected = a_call()
    graphs = []

    def backend(graph, _):
        assert not untried, "tried while it is traced"
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.int8_linear(x, weight, scale, mode="w8a8"), backend=backend, fullgraph=True)
    with torch.no_grad():
        same_bits("compiled", compiled(x), expected)
    assert len(graphs) == 1 and "_int_mm" not in graphs[0].code
    assert {*untried, *products._unfinished} == {("integer", True)}


class Watching(torch.overrides.TorchFunctionMode):
    seen = ()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = (*self.seen, function)
        return function(*args, **(kwargs or {}))


def test_a_trial_is_the_same_in_any_mode_of_the_caller_and_leaves_it(untried):
    random = torch.get_rng_state()
    expected = [products._extremes(3, 67, 5), products._of_bfloat16(3, 64, 5)]
    before = torch.get_default_dtype(), torch.get_default_device()
    try:
        torch.set_default_dtype(torch.float64)
        with (
            torch.device("meta"),
            torch.autocast("cpu", torch.bfloat16),
            torch.inference_mode(),
            Watching() as watching,
        ):
            products.integer_trial(math.inf)
            products.bfloat16_trial(math.inf)
            assert not watching.seen
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.empty(1).is_meta and torch.empty(1).dtype == torch.float64
    finally:
        torch.set_default_dtype(before[0])
    assert torch.get_default_device() == before[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert [products._extremes(3, 67, 5)[0].tolist(), products._of_bfloat16(3, 64, 5)[0].tolist()] == [
        pair[0].tolist() for pair in expected
    ]
    found = products.integer_trial()
    untried.clear()
    # Whether it is exact does not depend on who asked.
    assert ("not exact" in found.reason) is ("not exact" in products.integer_trial(math.inf).reason)


def test_without_mkldnn_there_is_another_trial(untried):
    x, weight, scale, expected = a_call(20)
    F.int8_linear(x, weight, scale, mode="w8a8")
    with torch.backends.mkldnn.flags(enabled=False):
        same_bits("product", F.int8_linear(x, weight, scale, mode="w8a8"), expected)
    assert {*untried, *products._unfinished} == {("integer", True), ("integer", False)}


@pytest.fixture
def clock(monkeypatch):
    """The clock that a trial's patience goes by, in a list."""
    now = [100.0]
    monkeypatch.setattr(products, "_wall", lambda: now[0])
    return now


def test_a_trial_that_takes_too_long_is_left_and_gone_on_with(untried, monkeypatch, clock):
    begun, done = [], []

    def steps():
        begun.append(torch.is_inference_mode_enabled())
        for step in range(40):
            done.append(step)
            clock[0] += 0.03
            yield
        return products.Trial(products.FLOATS, products.FLOATS, "after 40 steps of 30 ms")

    monkeypatch.setattr(products, "_try_integer", steps)
    x, weight, scale, expected = a_call()

    def call():
        before, begin = len(done), clock[0]
        same_bits("product", F.int8_linear(x, weight, scale, mode="w8a8"), expected)
        return len(done) - before, clock[0] - begin

    with torch.inference_mode():
        steps_made, seconds = call()
    assert 1 <= steps_made <= 4 and seconds < products._BUDGET + 0.03 and not untried
    assert products.integer_trial() == products._UNDECIDED
    assert call() == (0, 0), "it rests"
    clock[0] += 0.9 * products._REST * seconds
    assert call() == (0, 0)
    clock[0] += 0.2 * products._REST * seconds
    assert call()[0] == steps_made
    while not untried:
        clock[0] += 10
        assert call()[0] <= 4
    assert begun == [False] and done == list(range(40)) and not products._unfinished
    assert products.integer_trial().reason == "after 40 steps of 30 ms"


def test_who_needs_to_know_waits_for_a_trial_and_one_that_fails_begins_anew(untried, monkeypatch, clock):
    failing = [False, True]

    def steps():
        for _ in range(40):
            clock[0] += 1
            yield
        if failing.pop():
            raise KeyboardInterrupt
        return products.Trial(products.PACKED, products.FLOATS, "made up")

    monkeypatch.setattr(products, "_try_bfloat16", steps)
    assert products.bfloat16_trial().few == products.FLOATS
    with pytest.raises(KeyboardInterrupt):
        products.bfloat16_trial(math.inf)
    assert not untried and not products._unfinished
    assert products.bfloat16_trial(math.inf).few == products.PACKED


def test_times_of_a_busy_machine_do_not_decide(monkeypatch):
    # What each call takes, in ms: INT_MM a sixth of FLOATS, but for the first calls, in which it waits for a thread.
    waits = iter([9.0, 4.0, 2.5, 7.0, 3.1])
    now = [0.0]
    monkeypatch.setattr(products, "_clock", lambda: now[0])

    def slow(x, weight):
        now[0] += 0.6e-3

    def fast(x, weight):
        now[0] += next(waits, 0.1) * 1e-3

    trial = found_by(products._fastest({products.FLOATS: slow, products.INT_MM: fast}, torch.int8))
    assert trial[:2] == (products.INT_MM, products.INT_MM), trial.reason
    # And the other way: as fast as FLOATS only while FLOATS waits.
    waits = iter([])
    held = iter([5.0, 9.0, 3.3, 2.2])
    monkeypatch.setattr(products, "_PATIENCE", 1.0)

    def held_up(x, weight):
        now[0] += next(held, 0.1) * 1e-3

    trial = found_by(products._fastest({products.FLOATS: held_up, products.INT_MM: slow}, torch.int8))
    assert trial[:2] == (products.FLOATS, products.FLOATS), trial.reason


def test_info_says_what_was_found(capsys):
    facts = info.gathered()
    assert facts["devices"][0]["products"] == {
        "int8_linear": [f"w8a8: {products.integer_trial()}", f"w8a16 of bfloat16: {products.bfloat16_trial()}"]
    }
    info._show(facts)
    shown = capsys.readouterr().out
    assert f"  int8_linear w8a8: {products.integer_trial().few}" in shown
    assert products.integer_trial().reason in shown
