"""The benchmark suite's own workings: what it times is right, and what it reports is what it timed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from benchmarks import flex_peer, readme, tables, workloads
from benchmarks.measure import Turns
from benchmarks.memory import peak_in_child
from benchmarks.peers import LeftOutError
from benchmarks.runner import merged, run_parts
from benchmarks.suite import DOCUMENTS, PARTS, Entry, Target, entries_of
from benchmarks.workloads import ModuleWorkload, Workload

ROOT = Path(__file__).parents[1]
SMALL = {"batch": 2, "heads": 4, "length": 33, "head_dim": 16}
INGREDIENTS = (
    {},
    {"causal": True},
    {"mask": "bool"},
    {"mask": "bias"},
    {"mask": "bias_grad", "backward": True},
    {"mask": "triangle", "backward": True},
    {"documents": (3, 20, 10), "backward": True},
    {"keep": 0.5, "backward": True},
    {"window": 5},
    {"kv_heads": 2, "backward": True},
    {"length": 1, "keys": 40},
)


@pytest.mark.parametrize("fields", INGREDIENTS, ids=str)
def test_implementations_compute_the_same(fields: dict) -> None:
    inputs = Workload(**SMALL | fields).make()
    inputs.check()
    ours, torchs, naive = (inputs.call(name)() for name in ("fastattn", "torch", "naive"))
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours, naive, rtol=1e-6, atol=2e-6)
    if "documents" in fields:
        torch.testing.assert_close(ours, inputs.call("loop")(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_wrong_result_is_not_timed(dtype: torch.dtype, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        """Right forward unless ``backward``, where only the gradient is wrong, by 5 %."""

        @staticmethod
        def forward(ctx, x):
            return x.clone() if backward else 1.05 * x

        @staticmethod
        def backward(ctx, grad):
            return 1.05 * grad

    attention = workloads.fastattn.scaled_dot_product_attention
    monkeypatch.setattr(
        workloads.fastattn, "scaled_dot_product_attention", lambda *args, **kw: Wrong.apply(attention(*args, **kw))
    )
    with pytest.raises(AssertionError, match="grad_query" if backward else "out"):
        Workload(**SMALL, dtype=dtype, backward=backward).make().check()


@pytest.mark.parametrize("backward", (False, True))
def test_a_peer_that_computes_something_else_is_not_timed(backward: bool) -> None:
    inputs, causal = (Workload(**SMALL, backward=backward, causal=is_causal).make() for is_causal in (False, True))
    inputs.check({name: inputs.call(name) for name in ("torch", "naive")})
    with pytest.raises(AssertionError, match="torch computes something else: " + ("grad_" if backward else "out")):
        inputs.check({"torch": causal.call("torch")})


@pytest.mark.parametrize("causal", (False, True))
def test_onnxruntime_computes_the_same(causal: bool) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    inputs = Workload(**SMALL, causal=causal).make()
    torch.testing.assert_close(inputs.call("onnxruntime")(), inputs.call("torch")(), rtol=5e-7, atol=5e-7)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "fields", [fields for fields in (*INGREDIENTS, {"window": 5, "causal": True}) if "backward" not in fields], ids=str
)
def test_flex_attention_is_given_what_the_workload_says(fields: dict) -> None:
    """Uncompiled, which is slow but takes the same modifications."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    inputs = Workload(**SMALL | fields).make()
    options = flex_peer.modifications(inputs.query, inputs.key, **inputs.restrictions())
    theirs = flex.flex_attention(inputs.query, inputs.key, inputs.value, enable_gqa=True, **options)
    torch.testing.assert_close(theirs, inputs.call("fastattn")(), rtol=1e-6, atol=2e-6)


def test_compiled_flex_attention_is_compared_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents and padding in one compilation; then the same with a wrong result."""
    # Half of the time would go into compiling a probe of each instruction set.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)
    inputs = Workload(**SMALL | {"length": 200}, documents=(150, 50), keep=0.9).make()
    try:
        flex = inputs.call("flex")
    except LeftOutError as reason:
        pytest.skip(str(reason))
    inputs.check({"flex": flex})
    with pytest.raises(AssertionError, match="flex computes something else: out"):
        inputs.check({"flex": lambda: 1.001 * flex()})


def test_large_workloads_are_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a head, or its first queries, are compared; an error there is still found."""
    monkeypatch.setattr(workloads, "LONGEST_CHECKED_HEAD", 512)
    monkeypatch.setattr(workloads, "CHECKED_QUERIES", 64)
    for workload in (
        Workload(2, 4, 1024, 16, kv_heads=2, backward=True),
        Workload(1, 8, 512, 16, mask="bias_grad", backward=True),
        Workload(1, 8, 768, 16, causal=True),
    ):
        inputs = workload.make()
        inputs.check()
        monkeypatch.setattr(inputs, "_fastattn", lambda dropout, right=inputs._fastattn: 1.1 * right(dropout))
        with pytest.raises(AssertionError):
            inputs.check()


def test_module_workloads_agree_with_torch() -> None:
    for fields in ({}, {"backward": True}, {"need_weights": True}):
        inputs = ModuleWorkload(2, 17, 32, 4, **fields).make()
        inputs.check()
        with torch.no_grad():
            inputs.modules["fastattn"].out_proj.weight.mul_(1.01)
        with pytest.raises(AssertionError):
            inputs.check()


@pytest.mark.parametrize(
    ("workload", "flops"),
    [
        (Workload(2, 8, 2048, 64), 4 * 2 * 8 * 2048**2 * 64),
        (Workload(2, 8, 2048, 64, causal=True), 2 * 2 * 8 * 2048**2 * 64),
        (Workload(2, 8, 2048, 64, backward=True), 14 * 2 * 8 * 2048**2 * 64),
        (Workload(1, 16, 1, 128, keys=8192), 4 * 16 * 8192 * 128),
        (Workload(1, 2, 1000, 64, keep=0.25), 1000 * 1000 * 2 * 64),
        (Workload(1, 2, 1000, 64, window=10), 4 * 2 * 1000 * 21 * 64),
    ],
    ids=str,
)
def test_useful_flops(workload: Workload, flops: float) -> None:
    assert workload.flops == flops


def test_bytes_of_decoding() -> None:
    assert Workload(1, 16, 1, 128, torch.bfloat16, keys=8192).key_value_bytes == 2 * 16 * 8192 * 128 * 2
    assert Workload(1, 16, 1, 128, keys=10, kv_heads=4).key_value_bytes == 2 * 4 * 10 * 128 * 4


def test_every_entry_has_its_own_name_and_measures_its_targets() -> None:
    for part in PARTS:
        entries = entries_of(part)
        names = [str(entry) for entry in entries]
        assert len(set(names)) == len(names)
        for entry in entries:
            others = {target.other for target in entry.targets} - {""}
            assert others <= {*entry.peers, *entry.beside, *(["one thread"] if part == "two threads" else [])}


def test_targets_are_judged_by_what_was_measured() -> None:
    measured = {
        "share": 0.8,
        "ratio": {"torch": 2.0, "plain": 0.8},
        "flops": 90.0,
        "beside_flops": {"plain": 100.0},
    }
    judged = {
        Target("share", ">=", 0.8): (0.8, True),
        Target("share", ">=", 0.81): (0.8, False),
        Target("ratio", ">=", 1.9, "torch"): (2.0, True),
        Target("time", "<=", 1.2, "plain"): (1.25, False),
        Target("rate", ">=", 0.7, "plain"): (0.72, True),
        Target("ratio", ">=", 1.0, "naive"): (None, None),
    }
    for target, (reached, met) in judged.items():
        result = target.judge(measured, "avx512")
        assert result["met"] is met, target
        assert result["reached"] == (None if reached is None else pytest.approx(reached))
    assert Target("share", ">=", 0.9, needs="avx512").judge(measured, "avx512_bf16")["met"] is False
    assert Target("share", ">=", 0.9, needs="avx512_bf16").judge(measured, "avx512")["met"] is None


def test_peers_are_timed_between_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: clock[0])
    order = []

    def lasting(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            clock[0] += seconds

        return call

    peers = {"torch": lasting("torch", 0.3), "plain": lasting("plain", 0.05), "naive": lasting("naive", 7.0)}
    turns = Turns(lasting("fastattn", 0.1), peers, lambda: 1000.0, seconds=2.0)
    assert turns.rounds == 4  # 2 s of rounds of 0.45 s
    order.clear()
    own = []
    for _ in range(turns.rounds):
        turns.run_peers()
        start = clock[0]
        turns.run_call()
        own.append(clock[0] - start)
    # What took 7 s is not timed again; the two others take turns in coming first.
    assert order == ["torch", "plain", "fastattn", "plain", "torch", "fastattn"] * 2
    summary = turns.summary(own, work=50.0)
    assert summary["seconds"] == pytest.approx({"fastattn": 0.1, "torch": 0.3, "plain": 0.05, "naive": 7.0})
    assert summary["ratio"] == pytest.approx({"torch": 3.0, "plain": 0.5, "naive": 70.0})
    assert summary["share"] == pytest.approx(0.5)


def test_short_calls_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: clock[0])

    def short() -> None:
        clock[0] += 10e-6

    turns = Turns(short, {}, None, seconds=0.255)
    assert turns.repeats == 2000
    assert turns.rounds == 10
    start = clock[0]
    turns.run_peers()  # nobody's turn but that of the calls that run before the sample
    assert clock[0] - start == pytest.approx(500 * 10e-6)
    summary = turns.summary([2000 * 10e-6] * 10, work=1.0)
    assert summary["seconds"]["fastattn"] == pytest.approx(10e-6)
    assert "share" not in summary


def test_memory_of_naive_attention_holds_the_scores_and_ours_does_not() -> None:
    pytest.importorskip("fastattn._C", reason="the reference stores the scores")
    scores = 8 * 1024**2 * 4
    assert peak_in_child("naive", 1024) > 2 * scores
    assert peak_in_child("fastattn", 1024) < scores


def test_a_part_runs_from_the_suite_to_the_tables() -> None:
    pytest.importorskip("fastattn._C", reason="the probes need the extension")
    with Progress(disable=True) as progress:
        outcome = run_parts(("one thread",), seconds_scale=0.02, select="small", progress=progress)
    assert outcome.failed == [], outcome.output
    result = json.loads(json.dumps(outcome.result))
    assert [line["group"] for line in result["lines"]] == ["small", "small"]
    line = result["lines"][0]
    assert line["seconds"].keys() == line["ratio"].keys() | {"fastattn"} == {"fastattn", "torch", "naive"}
    assert line["share"] > 0.0
    assert result["parts"]["one thread"]["ceilings"]["read"] > 0.0
    peers = tables.peer_columns(result["lines"])
    assert peers == {"torch": "x torch", "naive": "x naive"}
    rows = tables.line_rows(result["lines"], peers)
    assert "1,8,16,64" in rows[0][1]
    (target,) = tables.target_rows(result)
    assert target[-1] in ("met", "missed")


def test_a_failing_check_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child whose every call is refused ends in names of failed tests, not in figures."""
    pytest.importorskip("fastattn._C", reason="the probes need the extension")
    monkeypatch.setenv("FASTATTN_CPU_ISA", "abacus")
    with Progress(disable=True) as progress:
        outcome = run_parts(("one thread",), seconds_scale=0.02, select="small", progress=progress)
    assert len(outcome.failed) >= 2
    assert "abacus" in outcome.output
    assert outcome.result["lines"] == []


def test_lines_measured_alone_complete_the_result() -> None:
    def line(part: str, workload: str, share: float) -> dict:
        return {"part": part, "group": "rate", "workload": workload, "share": share}

    about = {"schema": 1, "machine": "m", "versions": "v", "date": "d"}
    before = about | {
        "parts": {"one thread": {"isa": "old"}, "avx2": {"isa": "avx2"}},
        "lines": [line("one thread", "a", 0.1), line("one thread", "b", 0.2), line("avx2", "a", 0.3)],
        "memory": [{"bytes": 1}],
    }
    after = about | {
        "parts": {"one thread": {"isa": "new"}},
        "lines": [line("one thread", "c", 0.4), line("one thread", "b", 0.5)],
        "memory": [],
    }
    both = merged(before, after)
    assert both["parts"] == {"one thread": {"isa": "new"}, "avx2": {"isa": "avx2"}}
    assert [entry["share"] for entry in both["lines"]] == [0.1, 0.5, 0.3, 0.4]
    assert both["memory"] == [{"bytes": 1}]
    assert merged(before | {"date": "yesterday"}, after) == after


def test_entries_print_their_group_and_workload() -> None:
    entry = Entry("rate", Workload(2, 8, 512, 64, torch.bfloat16, backward=True, causal=True))
    assert str(entry) == "rate: 2,8,512,64 bfloat16 forward+backward causal"


def test_readme_blocks_are_replaced_and_nothing_else() -> None:
    text = "before\n<!-- memory: generated by make readme -->\nold\n<!-- end -->\nafter\n"
    result = {
        "memory": [
            {"implementation": "naive", "length": 2048, "bytes": 400 * 2**20},
            {"implementation": "fastattn", "length": 2048, "bytes": 10 * 2**20},
        ]
    }
    filled = readme.render(text, [result], [])
    assert filled.startswith("before\n<!-- memory")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "| 2048 | 400 |  | 10 |" in filled
    assert "2.5%" in filled
    assert "old" not in filled
    assert readme.render(filled, [result], []) == filled
    with pytest.raises(ValueError, match="no-such-table"):
        readme.render(text.replace("memory", "no-such-table"), [result], [])


def test_models_have_a_block_where_they_were_measured() -> None:
    text = "<!-- models: generated by make readme -->\n<!-- end -->"
    line = {"part": "models", "group": "models", "workload": "classifier 4x512", "ratio": {"torch": 1.5, "naive": 4.0}}
    step = {"model": "classifier", "implementation": "naive", "longest": 512}
    step |= {"seconds": {"512": 0.25, "1024": 1.0}, "peaks": {"512": 2**27, "1024": 2**29}}
    filled = readme.render(text, [{"lines": []}, {"lines": [line], "model_memory": [step]}], [])
    assert "| classifier 4x512 | 1.50 | 4.00 |" in filled
    assert "| classifier | naive | 512 | 0.25 | 512 |" in filled
    assert "No result" in readme.render(text, [{"lines": []}], [])


def test_the_gpu_block_says_what_a_run_measured() -> None:
    text = "<!-- gpu: generated by make readme -->\n<!-- end -->"
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    head = {"machine": {"gpu": "NVIDIA H200"}, "versions": versions, "date": "2026-11-28T10:00:00"}
    row = {"part": "bench", "status": "ok", "direction": "forward", "dtype": "bf16", "head_dim": 128, "variant": None}
    row |= {"heads": 16, "kv_heads": 16, "causal": None, "of_ceiling": 0.8}
    rows = [
        row | {"task": f"bench/d128_l{length}", "queries": length, "keys": length, "contender": name, "rate": rate}
        for length in (1024, 8192)
        for name, rate in (("fastattn", 600.4), ("cudnn", 590.0), ("matmul", 750.0))
    ]
    rows.append(row | {"task": "bench/host", "direction": "host", "contender": "fastattn", "us": 30.0})
    rows.append(row | {"task": "bench/d64", "status": "fail", "contender": "fastattn"})
    filled = readme.render(text, [], [{"head": head, "ceilings": {"matmul_tflops": 751.2}, "rows": rows}])
    assert "NVIDIA H200, torch 2.11.0, triton 3.6.0, 2026-11-28; a bf16 matrix product runs at 751 TFLOP/s." in filled
    (line,) = [line for line in filled.splitlines() if line.startswith("| d128_l8192")]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "d128_l8192", "forward", "600", "590", "", "", "", "", "0.80"
    ]  # fmt: skip
    assert "(gpu-bf16-d128.png)" in filled
    assert "No result is committed yet" in readme.render(text, [], [])


def _line(workload: Workload, group: str, **ratio: float) -> dict:
    """What a part with one thread keeps of a measured workload."""
    fields = json.loads(json.dumps(workload.fields()))
    line = {"part": "one thread", "group": group, "workload": str(workload), "fields": fields, "share": 0.875}
    return line | {"ratio": ratio, "seconds": {"fastattn": 0.5}}


def test_tables_have_the_peers_and_rows_that_were_measured() -> None:
    """Of results from before a peer or a case joined the suite, and after."""
    about = {"machine": {"cpu": "Z80", "cores": 2}, "versions": {"torch": "2.6"}, "date": "d"}
    about["parts"] = {"one thread": {"isa": "avx2"}}
    plain, packed = readme.SUMMARY[0], Workload(1, 8, 4096, 64, documents=DOCUMENTS)
    before = [_line(plain, "rate", torch=2.0, naive=3.0)]
    after = [
        _line(plain, "rate", torch=2.0, naive=3.0, flex=4.0),
        _line(replace(plain, dtype=torch.bfloat16), "rate", torch=5.0),
        _line(packed, "ingredients", torch=9.0, flex=1.25, loop=0.5, plain=4.0),
    ]

    def cells(table: str) -> list[list[str]]:
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("|")]

    old, new = (cells(readme.summary(about | {"lines": lines})) for lines in (before, after))
    left, right = ["call", "(B, H, L, D)", "pass", "of FMA rate"], ["bf16, of its rate", "bf16 x torch"]
    assert old[0] == [*left, "x torch", "x naive", *right]
    assert old[2:] == [["plain", "(2, 8, 2048, 64)", "forward", "0.88", "2.00", "3.00", "", ""]]
    columns = ["x torch", "x naive", "x FlexAttention", "x a loop over the documents"]
    assert new[0] == [*left, *columns, *right]
    assert new[2] == ["plain", "(2, 8, 2048, 64)", "forward", "0.88", "2.00", "3.00", "4.00", "", "0.88", "5.00"]
    assert new[3][0] == "8 packed documents"
    assert new[3][4:] == ["9.00", "", "1.25", "0.50", "", ""]
    ingredients = cells(readme.ingredients({"lines": after}))
    assert ingredients[0][3:] == ["time of plain", "x torch", "x FlexAttention", "x a loop over the documents"]
    assert ingredients[2][3:] == ["0.25", "9.00", "1.25", "0.50"]
    assert cells(readme.rates(about | {"lines": before}))[0].count("x FlexAttention") == 0


def test_the_readmes_own_table_is_of_the_machine_measured_last() -> None:
    text = "".join(f"<!-- {name}: generated by make readme -->\n<!-- end -->\n" for name in ("summary", "rates"))
    results = [
        {"machine": {"cpu": cpu, "cores": 2}, "versions": {"torch": "2.6"}, "date": date}
        | {"parts": {"one thread": {"isa": "avx2"}}, "lines": [_line(readme.SUMMARY[0], "rate", torch=2.0)]}
        for cpu, date in (("Z80", "2026-11-28"), ("6502", "2026-11-25"))
    ]
    table, rates = readme.render(text, results, []).split("<!-- rates")
    assert "Z80" in table and "6502" not in table
    assert "Z80" in rates and "6502" in rates


def test_what_is_left_out_is_said_with_its_reason() -> None:
    lines = [{"left_out": {"flex": "no compiler"}}, {}, {"left_out": {"flex": "no compiler", "onnxruntime": "absent"}}]
    rows = [["FlexAttention", "no compiler", "2"], ["ONNX Runtime", "absent", "1"]]
    assert tables.left_out_rows({"lines": lines}) == rows


def test_the_documents_say_what_the_committed_results_say(tmp_path: Path) -> None:
    for name in readme.FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert readme.update(tmp_path, ROOT / "benchmarks" / "results") == [], "run `make readme`"


def test_links_in_the_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_readmes_map_names_files_that_are_there() -> None:
    (section,) = re.findall(r"## Where things live\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    names = set(re.findall(r"`(\w+\.(?:py|h|cpp))`", section))
    there = {path.name for folder in ("csrc", "fastattn", "kernels") for path in (ROOT / folder).rglob("*")}
    assert len(names) > 20
    assert names <= there
