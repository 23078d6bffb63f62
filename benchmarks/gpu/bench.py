"""Part ``bench``: fastattn against its peers, each result verified before it is timed.

Tokens and model width are constant (B * L = 16384, H * D = 2048), as in the FlashAttention papers.
Useful work counts only what the band allows: 4 * D floating-point operations per allowed pair
forward, 10 * D backward. One row per contender and direction, with its fraction of a bf16 matrix
product timed in the same rounds; a decode row has the fraction of a copy's bandwidth instead.
"""

from __future__ import annotations

import os

from . import watchdog
from .pool import Task

TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
#: The lengths that are timed first, at D = 128: one in many waves, one that fits in few, one that shows the limit.
HEADLINE_LENGTHS = (8192, 1024, 16384)
#: Naive attention is left out of longer sequences, where it only costs time.
NAIVE_LENGTH = 4096
#: Eight query heads for each key head, as FlashAttention-4's marks on an H200 have them.
GROUPS = {"heads": 64, "kv_heads": 8}
PEERS = ("cudnn", "flash", "efficient", "naive")

#: (batch, query heads, kv heads, keys): the keys and values outgrow every cache.
DECODE = ((16, 32, 8, 8192), (1, 32, 8, 131072), (64, 32, 32, 2048), (1, 16, 16, 16384))

#: FlexAttention compiles for seconds per shape, so it takes part in some only: (D, L).
FLEX = {(128, 8192), (64, 8192)}
#: Not every length for D other than 128, and fp16 at one shape only: they follow bf16 at D = 128.
OTHERS = ((64, 8192), (64, 1024), (256, 8192), (64, 16384), (256, 1024))

#: Seconds that a stage may take: our kernels come from a cache, and a launch takes milliseconds; a peer may build a
#: plan first; FlexAttention compiles.
VERIFY_SECONDS = {"flex": 25.0}
COMPILE_SECONDS = 70.0
OURS_SECONDS, PEERS_SECONDS, TIMING_SECONDS = 25.0, 20.0, 6.0


def headline_tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """D = 128 in bf16, full and causal: what the project is judged by, with groups of query heads too."""
    if device == "cpu":
        return _tiny_tasks(backend)[:2]
    shapes = [(length, {}) for length in HEADLINE_LENGTHS]
    shapes.insert(2, (8192, GROUPS))
    groups = [
        _group(128, length, causal, "bf16", **changes) for length, changes in shapes for causal in (None, "upper_left")
    ]
    return [_task(group, backend) for group in groups[: 2 if quick else None]]


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """Every other group of contenders on one shape, in order of use."""
    if device == "cpu":
        return _tiny_tasks(backend)[2:]
    wanted = [(head_dim, length, "bf16") for head_dim, length in OTHERS[:3]]
    wanted += [(128, length, "bf16") for length in LENGTHS if length not in HEADLINE_LENGTHS]
    wanted += [(head_dim, length, "bf16") for head_dim, length in OTHERS[3:]]
    wanted.append((128, 8192, "fp16"))
    plain = [
        _task(_group(head_dim, length, causal, dtype), backend)
        for head_dim, length, dtype in wanted
        for causal in (None, "upper_left")
    ]
    variants = [_task(group, backend) for group in _variant_groups()]
    decode = [_decode_task(*shape, dtype="bf16", backend=backend) for shape in DECODE]
    if quick:
        return [*plain[:2], *variants[:2], *decode[:1]]
    return [*plain[:6], *decode, *variants, *plain[6:]]


def host_tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """What a call costs the host."""
    return [Task("bench", "bench/host", ".bench:run_host", {"device": device, "backend": backend}, 30.0, 4.0)]


def compile_tasks(groups: list[Task]) -> list[Task]:
    """FlexAttention's compilation, side by side: it leaves its kernels on disk.  Ours come from the cache."""
    return [
        Task(
            part="compile",
            key=f"compile/{task.key}",
            handler=".bench:compile_only",
            arguments={"setup": task.arguments["setup"], "contenders": ["flex"]},
            timeout=COMPILE_SECONDS,
            estimate=20.0,
        )
        for task in groups
        if "flex" in task.arguments.get("contenders", ())
    ]


def _group(head_dim: int, length: int, causal: str | None, dtype: str, **changes) -> dict:
    setup = {
        "batch": TOKENS // length,
        "heads": WIDTH // head_dim,
        "kv_heads": WIDTH // head_dim,
        "queries": length,
        "keys": length,
        "head_dim": head_dim,
        "dtype": dtype,
        "causal": causal,
    } | changes
    contenders = ["fastattn", "fastattn_unordered", "fastattn_plain", *PEERS]
    if length > NAIVE_LENGTH:
        contenders.remove("naive")
    if dtype == "bf16" and (head_dim, length) in FLEX and not changes:
        contenders.append("flex")
    return {"setup": setup, "contenders": contenders}


def _variant_groups() -> list[dict]:
    groups = [_group(128, 4096, None, "bf16", kv_heads=4), _group(128, 4096, "upper_left", "bf16", kv_heads=4)]
    groups.append(_group(128, 4096, "lower_right", "bf16", queries=2048))
    for variant in ("padding_50", "padding_25", "window", "mask", "mask_heads", "bias", "bias_grad", "dropout"):
        causal = "upper_left" if variant == "window" else None
        groups.append(_group(128, 4096, causal, "bf16", variant=variant))
    groups += [
        _group(96, 4096, None, "bf16"),
        _group(80, 4096, None, "bf16"),
        _group(128, 4096, None, "bf16", queries=4000, keys=4001),
        _group(128, 2048, None, "fp32"),
    ]
    for group in groups:
        group["contenders"] = [name for name in group["contenders"] if name != "flex"]
        grouped = group["setup"]["kv_heads"] == 4 and group["setup"]["causal"] is None
        if group["setup"].get("variant") in ("padding_50", "window", "bias") or grouped:
            group["contenders"].append("flex")
    return groups


def _task(group: dict, backend: str, directions: tuple[str, ...] = ("forward", "backward")) -> Task:
    setup = group["setup"] | {"backend": backend}
    heads = f"h{setup['heads']}" + (f"kv{setup['kv_heads']}" if setup["heads"] != setup["kv_heads"] else "")
    length = f"l{setup['queries']}" + (f"x{setup['keys']}" if setup["queries"] != setup["keys"] else "")
    parts = [f"d{setup['head_dim']}", length, f"b{setup['batch']}{heads}", setup["dtype"]]
    parts += [value for value in (setup.get("causal"), setup.get("variant")) if value]
    return Task(
        part="bench",
        key="bench/" + "_".join(parts),
        handler=".bench:run_group",
        arguments={"setup": setup, "contenders": group["contenders"], "directions": list(directions)},
        timeout=PEERS_SECONDS,
        estimate=1.8 + 2.0 * ("flex" in group["contenders"]),
    )


def _decode_task(batch: int, heads: int, kv_heads: int, keys: int, dtype: str, backend: str) -> Task:
    setup = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "queries": 1,
        "keys": keys,
        "head_dim": 128,
        "dtype": dtype,
    }
    contenders = ["fastattn", "flash", "cudnn", "efficient", "naive"]
    return _task({"setup": setup, "contenders": contenders}, backend, ("forward",))


def _tiny_tasks(backend: str) -> list[Task]:
    setup = {"batch": 2, "heads": 2, "kv_heads": 2, "queries": 32, "keys": 32, "head_dim": 16, "dtype": "fp32"}
    setup["device"] = "cpu"
    contenders = ["fastattn", "naive", "math", "cudnn"]
    causal = {"setup": setup | {"causal": "upper_left"}, "contenders": contenders}
    bias = {"setup": setup | {"variant": "bias_grad"}, "contenders": contenders}
    decode = {"setup": setup | {"queries": 1}, "contenders": contenders}
    return [
        _task({"setup": setup, "contenders": contenders}, backend),
        _task(causal, backend),
        _task(bias, backend),
        _task(decode, backend, ("forward",)),
    ]


def compile_only(context, setup: dict, contenders: list[str]) -> None:
    """Run what compiles at run time once; results are neither judged nor timed."""
    from .contenders import CONTENDERS, OURS, Setup
    from .problems import synchronize
    from .worker import run_stage

    made = Setup(**setup)

    def call(name: str) -> None:
        out = CONTENDERS[name](made)()
        if made.queries > 1:
            out.backward(made.tensors["grad_out"])
        synchronize(made.device)

    for name in contenders:
        if name in OURS or name == "flex":
            run_stage(context, name, lambda name=name: call(name), contender=name)


def run_group(context, setup: dict, contenders: list[str], directions: list[str]) -> None:
    """Verify each contender, then time those that are right, interleaved, in each direction."""
    import torch

    from fastattn.testing import GRADIENTS

    from .contenders import CONTENDERS, OURS, Setup
    from .verify import Truth
    from .worker import run_stage

    made = Setup(**setup)
    labels = {name: value for name, value in setup.items() if name not in ("device", "backend")}
    truth = Truth(made, "backward" in directions)
    forwards, outputs, accuracy = {}, {}, {}

    def watched(call):
        return watchdog.launch(context, context.current, call, made.device, **labels)

    # A stage that dies again and again is left out of all further tasks: at this head dimension, not at any other.
    family = f"d{made.head_dim}"
    for name in contenders:

        def verify(name=name) -> None:
            forward = CONTENDERS[name](made)
            with torch.set_grad_enabled("backward" in directions):
                out = watched(forward)
            results = {"out": out.detach()}
            if "backward" in directions:
                gradients = watched(backward_of(made, out, name))
                results |= dict(zip(GRADIENTS, gradients, strict=False))
            accuracy[name] = truth.judge(results, strict=name in OURS)
            forwards[name], outputs[name] = forward, out

        seconds = VERIFY_SECONDS.get(name, OURS_SECONDS if name in OURS else PEERS_SECONDS)
        run_stage(context, f"{family}/{name}", verify, seconds, contender=name, **labels)
    for direction in directions:
        functions = {
            name: without_graph(forward) if direction == "forward" else backward_of(made, outputs[name], name)
            for name, forward in forwards.items()
            if direction == "backward" or name != "fastattn_unordered"
        }

        def fields(name: str) -> dict:
            return {"contender": name, "of_budget": accuracy.get(name)}

        time_each(context, functions, made, direction, fields, labels | {"direction": direction}, family)


def time_each(
    context,
    functions: dict,
    made,
    direction: str,
    fields,
    labels: dict,
    family: str = "",
    relative_to: str | None = None,
) -> None:
    """Time functions in turns, each turn a stage of its own, so that one that hangs is the one that is left out.

    ``fields(name)``: further fields of its row. ``relative_to`` names the function whose speed is 1.
    """
    from .timing import time_beside_ceiling

    def stage_of(name: str) -> str:
        return "/".join(part for part in ("timing", family, name) if part)

    timed = time_beside_ceiling(functions, made, direction, lambda name: context.stage(stage_of(name), TIMING_SECONDS))
    of_one = timed[relative_to]["ms"] if relative_to in timed else None
    for name, values in timed.items():
        relative = {"relative": round(of_one / values["ms"], 4)} if of_one and name in functions else {}
        context.row("ok", stage=stage_of(name), **labels, **fields(name), **values, **relative)


def without_graph(forward):
    """The call as inference makes it."""
    import torch

    def call():
        with torch.no_grad():
            return forward()

    return call


def backward_of(setup, out, contender: str = "fastattn"):
    """The gradients of a contender's kept output."""
    import torch

    from .contenders import in_environment

    leaves, grad_out = setup.leaves, setup.tensors["grad_out"]
    return in_environment(contender, lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))


def run_host(context, device: str, backend: str) -> None:
    """What a call costs the host: wall time per call of a tiny forward, and of a layer."""
    import time

    import torch
    import torch.nn.functional as F

    import fastattn

    from .problems import synchronize

    q = torch.randn(1, 8, 16, 64, device=device, dtype=torch.bfloat16)
    layers = {
        "fastattn.MultiHeadAttention": fastattn.MultiHeadAttention(512, 8, batch_first=True, device=device),
        "nn.MultiheadAttention": torch.nn.MultiheadAttention(512, 8, batch_first=True, device=device),
    }
    x = torch.randn(
        16 if device == "cuda" else 1,
        1024 if device == "cuda" else 64,
        512,
        device=device,
        dtype=torch.bfloat16,
        requires_grad=True,
    )
    functions = {
        "fastattn": lambda: fastattn.scaled_dot_product_attention(q, q, q, backend=backend),
        "sdpa": lambda: F.scaled_dot_product_attention(q, q, q),
    }
    for name, layer in layers.items():
        layer = layer.bfloat16()
        functions[name] = lambda layer=layer: layer(x, x, x, need_weights=False)[0].sum().backward()
    for name, function in functions.items():
        context.stage(name)
        for _ in range(10):
            function()
        times = []
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(40):
                function()
            synchronize(device)
            times.append((time.perf_counter() - start) / 40)
        context.row("ok", contender=name, direction="host", us=round(sorted(times)[2] * 1e6, 2), pid=os.getpid())
