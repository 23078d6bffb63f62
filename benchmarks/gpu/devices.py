"""Part ``check``, second half: what a table of cases cannot ask of a device.

Streams, graphs, the compiler, operator contracts, the module, and offsets beyond 32 bits. Each
check is a function that raises AssertionError; each runs as a task of its own.
"""

from __future__ import annotations

from .pool import Task

CHECKS = (
    "side_stream",
    "side_stream_d128",
    "graph_forward",
    "graph_forward_d128",
    "graph_backward",
    "graph_backward_d128",
    "compiled",
    "compiled_dynamic",
    "operator_contract",
    "module",
    "module_padding",
    "module_weights",
    "autocast",
    "public_gradients",
    "forbidden_column",
    "explain",
    "refusals",
)
#: What a quick run on a CPU does of them: nothing that compiles for seconds.
QUICK_ON_CPU = ("module", "public_gradients", "forbidden_column", "autocast")
#: Calls before a capture: as many as it takes for the captured launch to be a remembered one (kernels/remembered.py).
WARM_CALLS = 3
#: These need up to 20 GB of device memory, and hardware: sizes shrink on a CPU.
WIDE_CHECKS = ("wide_batch_stride", "wide_row_stride", "wide_mask", "wide_bias", "many_heads")


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """The checks that may run side by side."""
    if quick:
        names = ("side_stream", "graph_forward", "graph_backward_d128", "compiled")
        return [_task(name, device, backend) for name in (names if device == "cuda" else QUICK_ON_CPU)]
    names = CHECKS
    if device == "cpu":
        names = [name for name in names if not name.startswith(("side_stream", "graph_", "refusals"))]
    return [_task(name, device, backend) for name in names]


def wide_tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """The checks that run one after another: side by side they would fill the device's memory."""
    names = WIDE_CHECKS
    if quick:
        names = () if device == "cuda" else WIDE_CHECKS[2:]
    return [_task(name, device, backend) for name in names]


def _task(name: str, device: str, backend: str) -> Task:
    compiles = name.startswith(("compiled", "operator"))
    return Task(
        part="check",
        key=f"check/device/{name}",
        handler=".devices:run",
        arguments={"name": name, "device": device, "backend": backend},
        timeout=100.0 if compiles else 40.0,
        estimate=15.0 if compiles else 4.0,
    )


def run(context, name: str, device: str, backend: str) -> None:
    """One check by name; its row says what the AssertionError says."""
    from . import devices
    from .worker import run_stage

    labels = {"case": name, "dtype": "device", "family": "device"}
    check = getattr(devices, name)

    def call() -> bool:
        check(device, backend)
        return True

    if run_stage(context, name, call, **labels):
        context.row("ok", stage=name, **labels)


def _tensors(device: str, *shape: int, count: int = 3, dtype=None, seed: int = 0):
    import torch

    dtype = dtype or torch.bfloat16
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def _close(actual, expected, what: str, tolerance: float = 2e-2) -> None:
    """Relative Frobenius error, NaN refused."""
    import torch

    error = torch.linalg.vector_norm(actual.double() - expected.double().to(actual.device))
    scale = torch.linalg.vector_norm(expected.double())
    if not error.item() <= tolerance * scale.item():
        raise AssertionError(f"{what}: error {error.item():.3e} at a norm of {scale.item():.3e}")


def _exact(query, key, value, causal: bool = False):
    """float64 attention by torch."""
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=causal)


def _attend(backend: str, causal: bool = True):
    import fastattn

    return lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal, backend=backend)


def side_stream(device: str, backend: str, head_dim: int = 64) -> None:
    """Work goes to the current stream: inputs that a slow stream has yet to write are waited for."""
    import torch

    attend = _attend(backend)
    sources = [tensor.requires_grad_() for tensor in _tensors(device, 2, 4, 300, head_dim)]
    expected = attend(*sources)
    expected.sum().backward()  # all is compiled now
    inputs = [torch.full_like(tensor.detach(), torch.nan).requires_grad_() for tensor in sources]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # about half a second: other processes may keep this one from the CPU
        with torch.no_grad():
            for tensor, source in zip(inputs, sources, strict=True):
                tensor.copy_(source)
        out = attend(*inputs)
        out.sum().backward()
    if stream.query():
        raise AssertionError("the call waited for the device")
    torch.cuda.synchronize()
    if not torch.equal(out, expected):
        raise AssertionError("the kernel ran outside the current stream")
    if not all(torch.equal(tensor.grad, source.grad) for tensor, source in zip(inputs, sources, strict=True)):
        raise AssertionError("the backward kernels ran outside the current stream")


def side_stream_d128(device: str, backend: str) -> None:
    """The same with the fused backward kernel, whose counters and total are zeroed on the stream too."""
    side_stream(device, backend, head_dim=128)


def _captured(call):
    """(graph, results) of a call that has run before, on another stream."""
    import torch

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(WARM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def graph_forward(device: str, backend: str, head_dim: int = 64) -> None:
    """A captured call, replayed on new data; masks, lengths, dropout and decode included."""
    import torch

    import fastattn

    lengths = torch.tensor([300, 17], device=device)
    mask = torch.rand(1, 1, 300, 300, device=device) < 0.8
    calls = {
        "causal": (300, {"causal": "lower_right"}),
        "lengths": (300, {"key_lengths": lengths}),
        "mask": (300, {"attn_mask": mask}),
        "decode": (1, {"key_lengths": lengths}),
        "dropout": (300, {"dropout_p": 0.1}),
    }
    for name, (queries, arguments) in calls.items():
        (query,) = _tensors(device, 2, 4, queries, head_dim, count=1)
        key, value = _tensors(device, 2, 4, 300, head_dim, count=2, seed=1)

        def call(query=query, key=key, value=value, arguments=arguments):
            return fastattn.scaled_dot_product_attention(query, key, value, backend=backend, **arguments)

        graph, out = _captured(call)
        query.copy_(_tensors(device, *query.shape, count=1, seed=2)[0])
        graph.replay()
        torch.cuda.synchronize()
        if name == "dropout":
            first = out.clone()
            graph.replay()
            if torch.equal(first, out) or not out.isfinite().all():
                raise AssertionError("a replayed dropout must draw anew")
            continue
        if not torch.equal(out, call()):
            raise AssertionError(f"{name}: the replay differs from a call")


def graph_forward_d128(device: str, backend: str) -> None:
    graph_forward(device, backend, head_dim=128)


def graph_backward(device: str, backend: str, head_dim: int = 64) -> None:
    """Forward and backward in one graph, replayed more than once on new data."""
    import torch

    attend = _attend(backend)
    inputs = [tensor.requires_grad_() for tensor in _tensors(device, 2, 4, 300, head_dim)]
    (grad_out,) = _tensors(device, 2, 4, 300, head_dim, count=1, seed=5)

    def call():
        return torch.autograd.grad(attend(*inputs), inputs, grad_out)

    graph, results = _captured(call)
    for seed in (6, 7):
        grad_out.copy_(_tensors(device, *grad_out.shape, count=1, seed=seed)[0])
        graph.replay()
        torch.cuda.synchronize()
        for result, other in zip(results, call(), strict=True):
            if not torch.equal(result, other):
                raise AssertionError(f"the replay with the data of seed {seed} differs from a call")


def graph_backward_d128(device: str, backend: str) -> None:
    """The same with the fused backward kernel: a replay must find its counters and its fp32 total zeroed."""
    graph_backward(device, backend, head_dim=128)


def compiled(device: str, backend: str, dynamic: bool = False) -> None:
    """torch.compile without graph breaks, forward and backward equal to eager."""
    import torch

    attend = _attend(backend)
    function = torch.compile(lambda q, k, v: attend(q, k, v) * 2, fullgraph=True, dynamic=dynamic)
    for length in (128, 200) if dynamic else (130,):
        inputs = [tensor.requires_grad_() for tensor in _tensors(device, 2, 4, length, 64)]
        results = torch.autograd.grad(function(*inputs).sum(), inputs)
        expected = torch.autograd.grad((attend(*inputs) * 2).sum(), inputs)
        for result, other in zip(results, expected, strict=True):
            _close(result, other, "compiled gradient", 1e-5)


def compiled_dynamic(device: str, backend: str) -> None:
    compiled(device, backend, dynamic=True)


def operator_contract(device: str, backend: str) -> None:
    """torch.library.opcheck on the registered operators with the device's tensors."""
    import importlib.util
    import sys
    import types
    import unittest

    import torch

    import fastattn  # noqa: F401  (registers the operators)

    if importlib.util.find_spec("expecttest") is None:
        # torch.library.opcheck imports torch's test utilities, which want a base class from this package.
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)

    inputs = [tensor.requires_grad_() for tensor in _tensors(device, 2, 4, 33, 32)]
    bias = torch.randn(1, 4, 33, 33, device=device, dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.tensor([33, 20], device=device)
    operator = torch.ops.fastattn.attention_forward.default
    plain = (*inputs, None, None, None, None, "upper_left", None, None, 0.0, None, backend)
    torch.library.opcheck(operator, plain)
    torch.library.opcheck(operator, (*inputs, None, bias, lengths, 0.3, None, 5, 7, 0.0, None, backend))


def _modules(device: str):
    import copy

    import torch

    import fastattn

    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(256, 4, batch_first=True)
    ours = fastattn.MultiHeadAttention(256, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    return ours.to(device, torch.bfloat16), exact


def _compare_modules(device: str, lengths: list[int] | None) -> None:
    """Output and gradients of MultiHeadAttention in bf16 against nn.MultiheadAttention in float64."""
    import torch

    ours, exact = _modules(device)
    (x,) = _tensors("cpu", 3, 140, 256, count=1, dtype=torch.float32)
    x_ours = x.to(device, torch.bfloat16).requires_grad_()
    x_exact = x_ours.detach().cpu().double().requires_grad_()
    padding = None
    if lengths is not None:
        padding = torch.arange(140)[None, :] >= torch.tensor(lengths)[:, None]
    on_device = None if padding is None else padding.to(device)
    out = ours(x_ours, x_ours, x_ours, key_padding_mask=on_device, need_weights=False)[0]
    expected = exact(x_exact, x_exact, x_exact, key_padding_mask=padding, need_weights=False)[0]
    _close(out, expected, "output")
    out.float().square().sum().backward()
    expected.square().sum().backward()
    _close(x_ours.grad, x_exact.grad, "gradient of the input", 5e-2)
    theirs = dict(exact.named_parameters())
    for name, parameter in ours.named_parameters():
        _close(parameter.grad, theirs[name].grad, f"gradient of {name}", 5e-2)


def module(device: str, backend: str) -> None:
    _compare_modules(device, None)


def module_padding(device: str, backend: str) -> None:
    _compare_modules(device, [140, 99, 1])


def module_weights(device: str, backend: str) -> None:
    """The averaged attention weights against nn.MultiheadAttention's; they sum to one."""
    import torch

    ours, exact = _modules(device)
    (x,) = _tensors("cpu", 2, 70, 256, count=1)
    out, weights = ours(*[x.to(device)] * 3)
    expected, expected_weights = exact(*[x.double()] * 3)
    _close(out, expected, "output")
    _close(weights, expected_weights, "weights")
    _close(weights.sum(-1), torch.ones(2, 70), "the sum of the weights", 1e-2)


def autocast(device: str, backend: str) -> None:
    """float32 inputs under autocast come out in bf16 and their gradients in float32."""
    import torch

    inputs = [tensor.requires_grad_() for tensor in _tensors(device, 2, 4, 65, 64, dtype=torch.float32)]
    with torch.autocast(device, torch.bfloat16):
        out = _attend(backend)(*inputs)
    if out.dtype != torch.bfloat16:
        raise AssertionError(f"the output is {out.dtype}")
    out.float().sum().backward()
    if any(tensor.grad.dtype != torch.float32 for tensor in inputs):
        raise AssertionError("a gradient is not float32")
    _close(out, _exact(*(tensor.detach() for tensor in inputs), causal=True), "output")


def public_gradients(device: str, backend: str) -> None:
    """Through autograd, in views of one projection, with a bias of which only it needs a gradient."""
    import torch

    import fastattn

    (projection,) = _tensors(device, 2, 130, 3, 4, 64, count=1)
    projection.requires_grad_()
    query, key, value = projection.permute(2, 0, 3, 1, 4)
    out = fastattn.scaled_dot_product_attention(query, key, value, backend=backend)
    (grad,) = torch.autograd.grad(out.float().square().sum(), projection)
    exact = projection.detach().double().requires_grad_()
    expected = _exact(*exact.permute(2, 0, 3, 1, 4))
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), exact)
    _close(out, expected, "output")
    _close(grad, expected_grad, "gradient of the projection")
    query, key, value = (tensor.detach() for tensor in (query, key, value))
    bias = torch.randn(4, 1, 130, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = fastattn.scaled_dot_product_attention(query, key, value, bias, backend=backend)
    (grad,) = torch.autograd.grad(out.float().square().sum(), bias)
    exact_bias = bias.detach().double().requires_grad_()
    scores = query.double() @ key.double().mT / 8.0 + exact_bias
    (expected_grad,) = torch.autograd.grad((scores.softmax(-1) @ value.double()).square().sum(), exact_bias)
    _close(grad, expected_grad, "gradient of the bias", 4e-2)


def forbidden_column(device: str, backend: str) -> None:
    """A key that a bias of -inf hides from every query may hold NaN, in ragged tiles too."""
    import torch

    from fastattn.problem import make_problem

    from .problems import fresh_results, load_backend

    engine = load_backend(backend)
    query, key, value = _tensors(device, 1, 2, 40, 64)
    bias = torch.randn(1, 1, 40, 40).to(device, torch.bfloat16)
    bias[..., 7] = -torch.inf
    grad_out = torch.ones_like(query)
    clean = fresh_results(engine, make_problem(query, key, value, attn_mask=bias), grad_out)
    for poisoned in (value, key):
        poisoned[..., 7, :] = torch.nan
        results = fresh_results(engine, make_problem(query, key, value, attn_mask=bias), grad_out)
        for name, tensor in results.items():
            if not torch.equal(tensor, clean[name]):
                raise AssertionError(f"NaN in a forbidden key changes {name}")


def explain(device: str, backend: str) -> None:
    """ "auto" takes this backend for the device's tensors."""
    import fastattn

    chosen = fastattn.explain(*_tensors(device, 1, 2, 64, 64)).backend
    if device == "cuda" and chosen != backend:
        raise AssertionError(f"auto chooses {chosen}")


def refusals(device: str, backend: str) -> None:
    """What the engine cannot take is a ValueError that names the backend, before any launch."""
    import torch

    double = _tensors(device, 1, 2, 64, 64, dtype=torch.float64)
    try:
        _attend(backend)(*double)
    except ValueError as error:
        if "float64" not in str(error) and "fp64" not in str(error):
            raise AssertionError(f"the message does not name the dtype: {error}") from None
    else:
        raise AssertionError("float64 was taken")


def wide_batch_stride(device: str, backend: str) -> None:
    """Batch entries more than 2^31 elements apart, in all inputs."""
    import torch

    apart = (1 << 31) + 64 if device == "cuda" else 1 << 16
    sources = _tensors(device, 2, 2, 100, 64)
    inputs = []
    for source in sources:
        buffer = torch.empty(apart + source[0].numel(), dtype=source.dtype, device=device)
        inputs.append(buffer.as_strided(source.shape, (apart, *source.stride()[1:])))
        inputs[-1].copy_(source)
    _compare_strided(inputs, sources, backend)


def wide_row_stride(device: str, backend: str) -> None:
    """Rows so far apart that row * stride passes 2^31, heads between them."""
    import torch

    apart = 1 << 25 if device == "cuda" else 1 << 10
    sources = _tensors(device, 1, 2, 100, 64)
    inputs = []
    for source in sources:
        buffer = torch.empty(100 * apart, dtype=source.dtype, device=device)
        inputs.append(buffer.as_strided(source.shape, (100 * apart, 64, apart, 1)))
        inputs[-1].copy_(source)
    _compare_strided(inputs, sources, backend)


def _compare_strided(inputs, sources, backend: str) -> None:
    """Strided inputs give the bits that contiguous ones give, forward and backward.

    The backend is called directly: its gradient buffers are contiguous, and nothing is copied.
    """
    import torch

    from fastattn.problem import make_problem

    from .problems import fresh_results, load_backend

    engine = load_backend(backend)
    grad_out = torch.ones_like(sources[0])
    wide = fresh_results(engine, make_problem(*inputs, causal="upper_left"), grad_out)
    narrow = fresh_results(engine, make_problem(*sources, causal="upper_left"), grad_out)
    _close(narrow["out"], _exact(*sources, causal=True), "contiguous output")
    for name, tensor in narrow.items():
        _close(wide[name], tensor, f"{name} from wide strides", 1e-4)


def _wide_scores(device: str, backend: str, with_bias: bool) -> None:
    """A mask or bias of more than 2^31 elements; some rows against float64, gradients finite."""
    import torch

    from fastattn.problem import make_problem

    from .problems import fresh_results, load_backend

    length = 47104 if device == "cuda" else 256
    query, key, value = _tensors(device, 1, 1, length, 64)
    if with_bias:
        mask = torch.empty(1, 1, length, length, device=device, dtype=torch.bfloat16).normal_()
    else:
        mask = torch.empty(1, 1, length, length, device=device, dtype=torch.uint8).random_(0, 2).bool()
    problem = make_problem(query, key, value, attn_mask=mask)
    grad_out = torch.ones_like(query)
    results = fresh_results(load_backend(backend), problem, grad_out)
    rows = torch.tensor([0, 1, length // 2, length - 2, length - 1], device=device)
    scores = query[:, :, rows].double() @ key.double().mT / 8.0
    chosen = mask[:, :, rows]
    scores = scores + chosen.double() if with_bias else scores.masked_fill(~chosen, -torch.inf)
    _close(results["out"][:, :, rows], scores.softmax(-1) @ value.double(), "output rows")
    # The columns of P sum to grad_value when grad_out is all ones: a check of the last keys' rows.
    total = results["grad_value"].double().sum() / value.shape[-1]
    _close(total, torch.tensor(float(length), dtype=torch.float64), "the sum of grad_value", 1e-2)


def wide_mask(device: str, backend: str) -> None:
    _wide_scores(device, backend, with_bias=False)


def wide_bias(device: str, backend: str) -> None:
    _wide_scores(device, backend, with_bias=True)


def many_heads(device: str, backend: str) -> None:
    """More batch * heads than a grid's second dimension holds (65535)."""
    import torch

    from fastattn.problem import make_problem

    from .problems import fresh_results, load_backend

    heads = 70000 if device == "cuda" else 70
    inputs = _tensors(device, 1, heads, 16, 64)
    results = fresh_results(load_backend(backend), make_problem(*inputs), torch.ones_like(inputs[0]))
    _close(results["out"], _exact(*inputs), "output")
    _close(results["grad_value"].sum(2), torch.full((1, heads, 64), 16.0), "the sum of grad_value")
