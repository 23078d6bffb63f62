"""What the Hopper kernels say that they cannot take, and that dispatch and explain follow it."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastattn import dispatch  # noqa: E402
from fastattn.backends import triton as backend  # noqa: E402
from fastattn.kernels import hopper, launch, remembered  # noqa: E402
from fastattn.kernels.hopper import capability, configs  # noqa: E402
from fastattn.kernels.hopper import launch as hopper_launch  # noqa: E402
from fastattn.kernels.hopper.launch_backward import chosen_config  # noqa: E402
from fastattn.kernels.hopper.plan import band_of  # noqa: E402
from fastattn.problem import Problem  # noqa: E402
from hopper_cases import make_case  # noqa: E402


class OnDevice(torch.Tensor):
    """A tensor that says that it lies on a CUDA device."""

    is_cuda = True

    def get_device(self):
        return 0


def on_device(problem):
    tensors = {name: getattr(problem, name).as_subclass(OnDevice) for name in ("query", "key", "value")}
    return problem._replace(**tensors)


@pytest.fixture
def device(monkeypatch):
    """Make torch report a device of a capability, and Triton a version: device((9, 0), "3.6.0")."""

    def install(device_capability, version=triton.__version__):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: device_capability)
        monkeypatch.setattr(triton, "__version__", version)
        capability._device_reason.cache_clear()
        remembered.forget()  # a device keeps its capability

    monkeypatch.delenv("FASTATTN_HOPPER", raising=False)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    backend.device_reason.cache_clear()
    yield install
    remembered.forget()
    capability._device_reason.cache_clear()
    backend.device_reason.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """The names of the engines that ran, in order; none computes anything."""
    found = []
    modules = {"hopper": (hopper.launch, hopper.launch_backward), "plain": (launch, launch)}
    for name, launchers in modules.items():
        for direction, module in zip(("forward", "backward"), launchers, strict=True):
            monkeypatch.setattr(module, direction, lambda *_, name=name: found.append(name))
    return found


def run(problem):
    backend.forward(problem, None, None)
    backend.backward(problem, *[None] * 8)


def test_chosen_on_capability_9_alone(device, ran):
    problem = on_device(make_case())
    for device_capability in ((9, 0), (8, 0), (10, 0)):
        device(device_capability)
        run(problem)
    assert ran == ["hopper"] * 2 + ["plain"] * 4


def test_the_environment_turns_them_off(device, ran, monkeypatch):
    device((9, 0))
    problem = on_device(make_case())
    monkeypatch.setenv("FASTATTN_HOPPER", "0")
    run(problem)
    assert ran == ["plain"] * 2
    assert hopper.reasons(problem) == ["FASTATTN_HOPPER=0"]
    monkeypatch.setenv("FASTATTN_HOPPER", "1")
    assert hopper.reasons(problem) == []


def test_explain_says_which_kernels_run(device, monkeypatch):
    device((9, 0))
    text = str(dispatch.explain_problem(on_device(make_case(D=32)), "triton"))
    assert text.startswith("backend: triton\n  forward: plain kernels, because the Hopper kernels take equal head dim")
    assert dispatch.explain_problem(on_device(make_case()), "triton").notes == (
        "forward: Hopper kernels",
        "backward: Hopper kernels",
    )
    monkeypatch.setenv("FASTATTN_HOPPER", "0")
    text = str(dispatch.explain_problem(on_device(make_case()), "triton"))
    assert "  forward: plain kernels, because FASTATTN_HOPPER=0\n" in text
    assert "  backward: plain kernels, because FASTATTN_HOPPER=0\n" in text


def test_a_decoding_step_goes_to_the_kernels_that_split_keys(device, ran):
    device((9, 0))
    problem = on_device(make_case(Lq=1, Lk=1024))
    run(problem)
    assert ran == ["plain", "hopper"]
    assert "split" in dispatch.explain_problem(problem, "triton").notes[0]


@pytest.mark.parametrize("version", ["3.6.0", "3.6.1", "3.7.1", "3.8.0", "3.9.0"])
def test_versions_of_triton_whose_code_was_read(device, version):
    device((9, 0), version)
    assert hopper.reasons(on_device(make_case())) == []


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0+git1234"])
def test_other_versions_of_triton_fall_back(device, version, monkeypatch):
    device((9, 0), version)
    (reason,) = hopper.reasons(on_device(make_case()))
    assert version in reason and "FASTATTN_HOPPER=1" in reason
    monkeypatch.setenv("FASTATTN_HOPPER", "1")
    assert hopper.reasons(on_device(make_case())) == []


@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 96, 128, 192, 256])
def test_head_dimensions(head_dim):
    assert capability.problem_reasons(make_case(D=head_dim)) == []


@pytest.mark.parametrize("head_dim", [16, 32, 65, 100, 264])
def test_other_head_dimensions_are_refused(head_dim):
    (reason, *_) = capability.problem_reasons(make_case(D=head_dim))
    assert f"not {head_dim} and {head_dim}" in reason


def narrow(problem, **changes):
    return capability.problem_reasons(problem._replace(**changes))


def test_every_ingredient_that_is_not_taken_is_refused():
    problem = make_case(B=1, H=2, Lq=8, Lk=8)
    scores = torch.zeros(1, 2, 8, 8)
    refused = {
        "attn_mask": {"attn_mask": scores.bool()},
        "bias": {"bias": scores},
        "dropout_p": {"dropout_p": 0.5, "rng_state": torch.zeros(2, dtype=torch.int64)},
        "scale": {"scale": -1.0},
        "query": {"query": problem.query.float(), "key": problem.key.float(), "value": problem.value.float()},
        "value": {"value": torch.zeros(1, 2, 8, 72, dtype=torch.bfloat16)},
    }
    for name, changes in refused.items():
        assert len(narrow(problem, **changes)) == 1, name
    taken = {"query", "key", "value", "scale", "causal", "window_left", "window_right", "key_lengths"}
    # a new ingredient of a problem has to be taken here, or refused
    assert set(Problem._fields) == taken | refused.keys() | {"rng_state"}


def test_a_left_bound_at_a_place_of_each_sequence_is_refused():
    """Its first seen key would be another in each: what lies before may be NaN."""
    problem = make_case(B=2, H=2, Lq=8, Lk=24, lengths=(24, 20), causal="lower_right", window=(3, None))
    (reason,) = capability.problem_reasons(problem)
    assert "left bound" in reason and "each sequence's own last key" in reason
    for changes in ({"window_left": None}, {"window_left": 100}, {"key_lengths": None}, {"causal": "upper_left"}):
        assert narrow(problem, **changes) == []


def test_what_tma_cannot_address_is_refused():
    problem = make_case(B=2, H=2, Lq=8, Lk=8)
    key = torch.zeros(4096, dtype=torch.bfloat16)
    for view, reason in {
        key[4:2052].view(2, 2, 8, 64): "not aligned to 16 bytes",
        torch.zeros(2, 2, 8, 68, dtype=torch.bfloat16)[..., :64]: "strides",
        key[:1024].view(2, 1, 8, 64).expand(2, 2, 8, 64): "strides",
        torch.zeros(2, 2, 64, 8, dtype=torch.bfloat16).mT: "last stride",
    }.items():
        (found,) = narrow(problem, key=view)
        assert "key" in found and reason in found
    assert narrow(problem, key=torch.zeros(2, 8, 2, 64, dtype=torch.bfloat16).transpose(1, 2)) == []


def test_sizes_past_32_bits_are_refused():
    one = torch.zeros(1, dtype=torch.bfloat16)
    problem = make_case()
    long = one.expand(1, 1, 2**29, 64)
    assert "shorter than" in capability.size_reasons(problem._replace(key=long, value=long))[0]
    many = one.expand(2**24, 1, 1, 64)
    (reason,) = capability.size_reasons(problem._replace(query=many, key=many, value=many))
    assert "padded rows" in reason


def chosen_backward(**shape):
    problem = make_case(D=128, **shape)
    return chosen_config(problem, band_of(problem))


def test_an_unordered_dq_is_an_explicit_choice_that_determinism_overrules(monkeypatch):
    monkeypatch.delenv("FASTATTN_HOPPER_UNORDERED", raising=False)
    assert chosen_backward().fused and chosen_backward().ordered
    monkeypatch.setenv("FASTATTN_HOPPER_UNORDERED", "1")
    assert not chosen_backward().ordered
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen_backward().ordered
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("shape", "fused"),
    [
        ({"H": 2, "Lq": 2048, "Lk": 2048}, True),
        ({"H": 4, "group": 4, "B": 2, "Lq": 8192, "Lk": 8192}, True),  # 128 programs: nearly all multiprocessors
        ({"H": 8, "group": 8, "Lq": 1024, "Lk": 1024}, False),  # 8 programs; 64 for dQ
        ({"H": 2, "Lq": 4096, "Lk": 256}, False),
    ],
    ids=str,
)
def test_few_key_heads_take_two_sweeps(shape, fused):
    assert chosen_backward(**shape).fused == fused


def test_what_was_measured_of_the_fused_backward_decides(monkeypatch):
    full = {"H": 2, "Lq": 2048, "Lk": 2048}
    causal = {**full, "causal": "upper_left"}
    monkeypatch.setitem(configs.FUSED_FROM, True, 2049)
    assert chosen_backward(**full).fused and not chosen_backward(**causal).fused
    monkeypatch.setitem(configs.FUSED_FROM, True, 2048)
    assert chosen_backward(**causal).fused
    monkeypatch.setitem(configs.FUSED_STALLS, True, 1.5)
    assert chosen_backward(**full).fused and not chosen_backward(**causal).fused


def test_a_descriptor_has_the_columns_of_a_tile_and_the_sizes_of_its_tensor():
    tensor = torch.zeros(1, 2, 24, 72, dtype=torch.bfloat16)
    made = hopper_launch.tile_descriptor(tensor, 64)
    assert made.base is tensor and made.shape == [1, 2, 24, 72] and made.block_shape == [1, 1, 64, 128]
    assert made.strides == [72, 24 * 72, 72, 1]  # of a dimension of size 1, any that is legal


def alike(problem, **changes):
    """The problem in other memory, with other fields."""
    tensors = {name: getattr(problem, name).clone() for name in ("query", "key", "value")}
    return on_device(problem._replace(**(tensors | changes)))


def test_what_kernels_run_is_asked_once_of_calls_alike(device, ran, monkeypatch):
    device((9, 0))
    problem, asked, reasons = make_case(D=128), [], hopper.reasons
    monkeypatch.setattr(hopper, "reasons", lambda problem: asked.append(problem) or reasons(problem))
    for _ in range(3):
        run(alike(problem))
    assert ran == ["hopper"] * 6
    assert len(asked) == 2  # the forward and the backward


def misaligned(tensor):
    moved = tensor.new_empty(tensor.numel() + 4)[4:].view(tensor.shape)
    assert moved.data_ptr() % 16 == 8
    return moved


def padded_rows(tensor):
    return tensor.new_empty(*tensor.shape[:3], tensor.shape[3] + 4)[..., :-4]


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("change", [misaligned, padded_rows, lambda tensor: tensor.mT.contiguous().mT])
def test_what_ran_for_one_call_does_not_for_one_of_other_addresses_or_strides(device, ran, name, change):
    device((9, 0))
    problem = make_case(D=128)
    run(alike(problem))
    run(alike(problem, **{name: change(getattr(problem, name))}))
    run(alike(problem))
    assert ran == ["hopper"] * 2 + ["plain"] * 2 + ["hopper"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {name: torch.zeros(1, 2, 160, 128) for name in ("query", "key", "value")},  # float32
        {name: torch.zeros(1, 2, 160, 32, dtype=torch.bfloat16) for name in ("query", "key", "value")},
        {"attn_mask": torch.ones(1, 2, 160, 160, dtype=torch.bool)},
        {"bias": torch.zeros(1, 2, 160, 160)},
        {"dropout_p": 0.5},
        {"scale": -1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_ran_for_one_call_does_not_for_one_of_another_kind(device, ran, changes):
    device((9, 0))
    problem = make_case(B=1, H=2, Lq=160, Lk=160, D=128)
    run(alike(problem))
    tensors = {name: value.as_subclass(OnDevice) for name, value in changes.items() if isinstance(value, torch.Tensor)}
    run(alike(problem, **(changes | tensors)))
    run(alike(problem))
    assert ran == ["hopper"] * 2 + ["plain"] * 2 + ["hopper"] * 2


def test_the_environment_and_the_version_of_triton_decide_anew_each_time(device, ran, monkeypatch):
    device((9, 0), "3.6.0")
    problem = make_case(D=128)
    for value in ("1", "0", "1", None, "0"):
        if value is None:
            monkeypatch.delenv("FASTATTN_HOPPER")
        else:
            monkeypatch.setenv("FASTATTN_HOPPER", value)
        run(alike(problem))
    monkeypatch.delenv("FASTATTN_HOPPER")
    for version in ("3.5.1", "3.6.0"):
        monkeypatch.setattr(triton, "__version__", version)
        run(alike(problem))
    assert ran[::2] == ran[1::2] == ["hopper", "plain", "hopper", "hopper", "plain", "plain", "hopper"]


def test_the_order_of_dq_is_that_of_the_call(device, monkeypatch):
    """Whether its parts may be added in any order, which may change between calls alike."""
    device((9, 0))
    found = []
    monkeypatch.setattr(
        hopper.launch_backward, "backward", lambda *arguments: found.append(arguments[-1].once("seen", len, found))
    )
    problem = make_case(D=128)
    for value in ("0", "1", "0", "1"):
        monkeypatch.setenv("FASTATTN_HOPPER_UNORDERED", value)
        backend.backward(alike(problem), *[None] * 8)
    torch.use_deterministic_algorithms(True)
    try:
        backend.backward(alike(problem), *[None] * 8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [0, 1, 0, 1, 4]
