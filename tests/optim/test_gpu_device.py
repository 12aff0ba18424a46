"""What the Triton step can show on a GPU only: no waiting, captured graphs, memory."""

import warnings
from collections.abc import Callable

import pytest
import torch

from tests.optim.lists import (
    DEVICE,
    Lists,
    assert_same_bits,
    copy,
    make_lists,
)


def big_lists() -> Lists:
    return make_lists(3_000_000, 1_000_001, 768, 12)


def on_side_stream(work: Callable[[], None]) -> None:
    """Run `work` before a capture, as torch asks for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    lists = big_lists()
    lr = torch.tensor(1e-3, device=DEVICE)
    lists.step_("adamw", lr=lr)
    warnings.simplefilter("ignore", UserWarning)  # the mode says once that it is a prototype
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(5):
            lists.grads = [grad.clone() for grad in lists.grads]
            lists.step_("adamw", lr=lr, a=[0.1 * i, 0.2, 0.3, 0.4], b=1e-6 * i)
            lists.step_("momentum", lr=1e-3 / (i + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_follows_learning_rate_and_step_count() -> None:
    lists = big_lists()
    expected = copy(lists)
    lr, a = torch.tensor(1e-3, device=DEVICE), torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)
    on_side_stream(lambda: copy(lists).step_("adamw", lr=lr, a=a))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists.step_("adamw", lr=lr, a=a)
    for value in (1e-3, 5e-4, 2e-3):
        lr.fill_(value)
        a.mul_(0.5)
        graph.replay()
        expected.step_("adamw", lr=value, a=a)
    assert [float(step) for step in lists.steps] == [13.0] * 4
    assert_same_bits(lists, expected)


@pytest.mark.gpu
def test_a_whole_training_step_can_be_captured_and_steps_outside_do_not_disturb_it() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, device=DEVICE)
    params = list(layer.parameters())
    batch = torch.randn(8, 64, device=DEVICE)
    lr = torch.tensor(1e-2, device=DEVICE)

    def lists_of() -> Lists:
        return Lists(
            [p.detach() for p in params],
            [],
            [torch.zeros_like(p) for p in params],
            [torch.zeros_like(p) for p in params],
            [torch.zeros((), device=DEVICE) for _ in params],
            [None, None],
            [None, None],
        )

    def train(lists: Lists) -> None:
        for param in params:
            param.grad = None
        layer(batch).square().mean().backward()
        lists.grads = [p.grad for p in params if p.grad is not None]
        lists.step_("adamw", lr=lr)

    begin = [p.detach().clone() for p in params]
    eager = lists_of()
    on_side_stream(lambda: train(eager))
    for _ in range(3):
        train(eager)
    wanted = [p.detach().clone() for p in params]
    captured, other = lists_of(), lists_of()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(captured)
    with torch.no_grad():
        for param, value in zip(params, begin, strict=True):
            param.copy_(value)
    for _ in range(4):
        graph.replay()
        kept = [p.detach().clone() for p in params]
        train(other)
        with torch.no_grad():
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)
    for param, value in zip(params, wanted, strict=True):
        assert torch.allclose(param, value, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_two_runs_are_the_same_bit_for_bit() -> None:
    one, other = big_lists(), big_lists()
    for _ in range(5):
        one.step_("adamw")
        other.step_("adamw")
    assert_same_bits(one, other)


@pytest.mark.gpu
def test_a_step_needs_no_memory_of_its_own() -> None:
    lists = make_lists(30_000_000)
    lists.step_("adamw")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lists.step_("adamw")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1 << 20
