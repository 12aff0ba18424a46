"""Every method against what it says of itself, on a few tensors that a toy loss trains."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from hamcli.optim import HAM
from hamcli.recipe.schema import SparsitySection
from hamcli.sparsity.catalogue import make_course
from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.courses import Course
from hamcli.sparsity.exchange import annealed, exchanged
from hamcli.sparsity.factors import Factors, balanced, unbalanced
from hamcli.sparsity.levels import Levels, corrected
from hamcli.sparsity.masks import num_dropped
from hamcli.sparsity.schedule import make_alternating
from hamcli.sparsity.targets import Target, Targets
from hamcli.sparsity.thresholding import soft_threshold
from hamcli.training import in_cycles, warm_up_and_decay

STEPS = 40
METHODS = (
    "gradual", "one-shot", "random", "ac-dc", "rigl", "cyclic", "str", "spred", "pilot", "sign-in",
    "ast",
)  # fmt: skip


class Net(nn.Module):
    """Two layers with batch norm between them, of which the weights are targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class Run:
    """A whole run of the toy net, which can be stopped and restored."""

    def __init__(self, method: str, *, alpha: float = 0.0, beta: float = 0.0, **words) -> None:
        self.model = Net()
        self.targets = Targets(
            tuple(
                Target(name, self.model.get_parameter(name), 1)
                for name in ("first.weight", "last.weight")
            )
        )
        section = {"method": method, "target": 0.75, "update_every": 0.05} | words
        self.course = make_course(
            SparsitySection(**section), self.targets, self.model, steps=STEPS, seed=0
        )
        others = [p for n, p in self.model.named_parameters() if n not in self.targets.names]
        self.optimizer = HAM(
            [{"params": self.course.params}, {"params": others}],
            lr=0.02,
            weight_decay=0.0,
            alpha=alpha,
            beta=beta,
        )

    def train(self, first: int = 1, last: int = STEPS) -> "Run":
        if first == 1:
            self.optimizer.set_masks(self.course.after_step(0))
        for step in range(first, last + 1):
            torch.manual_seed(step)
            x = torch.randn(32, 8)
            self.course.before_step(step)
            ((self.model(x) - x[:, :4].sin()) ** 2).mean().backward()
            self.course.after_backward(step)
            self.optimizer.step()
            self.optimizer.set_masks(self.course.after_step(step))
            self.optimizer.zero_grad()
        return self

    @property
    def zeros(self) -> int:
        return sum(int((param == 0).sum()) for param in self.targets.params)

    @property
    def due(self) -> int:
        return num_zeros(0.75, self.targets.total)


@pytest.mark.parametrize(
    ("allocation", "alpha"),
    [("auto", 0.0), ("auto", 2.0), ("uniform", 2.0), ("erk", 0.0), ("lamp", 2.0)],
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_exact_with_and_without_ham(method, allocation, alpha):
    run = Run(method, alpha=alpha, beta=alpha / 100, allocation=allocation, max_sparsity=0.9)
    run.train().course.finish()
    assert run.zeros == run.due == run.course.sparsifier.num_zeros
    assert run.course.sparsifier.num_masked == run.due
    for param in run.targets.params:
        assert int((param == 0).sum()) <= 0.9 * param.numel()
        assert param.isfinite().all()


@pytest.mark.parametrize("pattern", ["2:4", "block:2x4"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "rigl"])
def test_every_method_ends_in_its_pattern(method, pattern):
    run = Run(method, pattern=pattern, target=0.5)
    run.train().course.finish()
    assert run.zeros == num_zeros(0.5, run.targets.total)
    for param in run.targets.params:
        if pattern == "2:4":
            assert ((param != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        else:
            alive = (param != 0).unflatten(0, (-1, 2)).unflatten(2, (-1, 4)).float().mean((1, 3))
            assert ((alive == 0) | (alive == 1)).all()


def test_rigl_takes_blocks_but_no_groups():
    run = Run("rigl", pattern="block:2x4", target=0.5)
    before = [mask.clone() for mask in run.train(1, 2).course.sparsifier.masks]
    run.train(3).course.finish()
    assert run.zeros == num_zeros(0.5, run.targets.total)
    after = run.course.sparsifier.masks
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(Exception, match="E225"):
        Run("rigl", pattern="2:4", target=0.5)


@pytest.mark.parametrize("stop", [1, 9, 20, 30, 39])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_for_bit(method, stop):
    words = {"levels": [0.3, 0.75]} if method == "ast" else {}
    straight = Run(method, alpha=2.0, beta=0.01, **words).train()
    first = Run(method, alpha=2.0, beta=0.01, **words).train(1, stop)
    saved = {key: value.clone() for key, value in first.course.state().items()}
    second = Run(method, alpha=2.0, beta=0.01, **words)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.course.load_state(saved)
    second.train(stop + 1)
    for run in (straight, second):
        run.course.finish()
    ours, theirs = second.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("rigl", "ac-dc")])
def test_weights_that_come_as_zeros_do_not_harm(method):
    run = _with_zeros(method)
    run.train().course.finish()
    assert run.zeros == run.due


def _with_zeros(method: str) -> Run:
    """A run whose model brings zeros: the course must be made from them."""
    original = Net.__init__

    def patched(self: Net) -> None:
        original(self)
        with torch.no_grad():
            self.first.weight[:3] = 0.0

    Net.__init__ = patched
    try:
        return Run(method)
    finally:
        Net.__init__ = original


# --- ac-dc


def test_the_published_phases_of_ac_dc():
    phases = make_alternating(0.9, steps=100, phase=0.05, freeze_last=0.15)
    dense = [step for step in range(100) if phases.sparsity(step, 0.0) == 0.0]
    assert dense[:10] == list(range(10))
    assert dense[-10:] == list(range(75, 85))
    assert [step for step in dense if 10 <= step < 75] == [
        step for step in range(10, 75) if (step - 10) // 5 % 2 == 1
    ]
    assert phases.last == 85


@pytest.mark.parametrize("steps", range(1, 60))
def test_ac_dc_of_any_length_ends_sparse(steps):
    phases = make_alternating(0.9, steps=steps, phase=0.05, freeze_last=0.3)
    assert phases.sparsity(steps, 0.0) == 0.9
    assert list(phases.switches) == sorted(set(phases.switches))
    assert len(phases.switches) % 2


def test_ac_dc_lets_all_weights_train_and_recycled_ones_begin_without_momentum():
    run = Run("ac-dc", phase=0.1, freeze_last=0.3)
    run.train(1, 11)
    param = run.targets.params[0]
    assert run.course.sparsity == 0.75
    dropped = ~run.course.sparsifier.masks[0]
    assert (param[dropped] == 0).all()
    run.train(12, 12)  # the sparse phase ends
    assert run.course.sparsity == 0.0
    assert (run.optimizer.state[param]["exp_avg"][dropped] == 0).all()
    run.train(13, 13)
    # a unit that leads nowhere has no gradient yet
    assert (param[dropped] != 0).any()


# --- rigl


def test_an_exchange_by_hand():
    mask = torch.tensor([[True, True, True, True], [False, False, False, False]])
    weight = torch.tensor([[0.5, 0.1, -0.4, 0.2], [0.0, 0.0, 0.0, 0.0]])
    grad = torch.tensor([[9.0, 9.0, 9.0, 9.0], [0.0, -3.0, 1.0, 2.0]])
    expected = torch.tensor([[True, False, True, False], [False, True, False, True]])
    assert torch.equal(exchanged(mask, weight.abs(), grad, 0.5), expected)
    # one candidate only: one goes, one comes
    grad[1, 2:] = 0.0
    expected = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert torch.equal(exchanged(mask, weight.abs(), grad, 0.5), expected)


def test_the_exchange_fades_out():
    assert annealed(0.3, 0, 100) == 0.3
    assert annealed(0.3, 50, 100) == pytest.approx(0.15)
    assert annealed(0.3, 100, 100) == pytest.approx(0.0)


def test_rigl_keeps_the_counts_of_erk_and_grows_from_zero():
    run = Run("rigl", update_every=0.1)
    run.train(1, 3)
    before = [mask.clone() for mask in run.course.sparsifier.masks]
    run.train(4, 4)
    after = run.course.sparsifier.masks
    for target, old, new in zip(run.targets, before, after, strict=True):
        assert old.sum() == new.sum()
        grown = new & ~old
        assert grown.any()
        assert (target.param[grown] == 0).all()
        assert (run.optimizer.state[target.param]["exp_avg"][grown] == 0).all()
    run.train(5, 5)
    grown = after[0] & ~before[0]
    assert (run.targets.params[0][grown] != 0).all()


@pytest.mark.parametrize(("words", "every"), [({}, 5), ({"update_every": 0.2}, 20)])
def test_rigl_lets_what_is_new_grow_before_the_next_exchange(words, every):
    targets = Run("rigl").targets
    section = SparsitySection(method="rigl", target=0.75, **words)
    course = make_course(section, targets, Net(), steps=100, seed=0)
    before = None
    changed = []
    for step in range(71):
        for param in targets.params:
            param.grad = torch.randn_like(param)
        course.after_step(step)
        masks = torch.cat([mask.flatten() for mask in course.sparsifier.masks])
        if before is not None and not torch.equal(masks, before):
            changed.append(step)
        before = masks.clone()
    due = list(range(every, 70, every))
    assert changed[:2] == due[:2]
    assert set(changed) <= set(due)  # near the end the annealed share is less than a weight


def test_every_other_method_chooses_masks_a_hundred_times_a_run():
    section = SparsitySection(method="gradual", target=0.75)
    assert section.update_every == "auto"
    run = Run("gradual", update_every="auto")
    given = Run("gradual", update_every=0.01)
    for one in (run, given):
        one.train()
    for left, right in zip(run.targets.params, given.targets.params, strict=True):
        assert torch.equal(left, right)


# --- cyclic


def test_cycles_of_the_learning_rate_begin_anew():
    make = lambda steps: warm_up_and_decay("cosine", peak=1.0, steps=steps, warmup=0.0)  # noqa: E731
    lr_at = in_cycles(make, 40, (10, 20, 28))
    assert [lr_at(step) for step in (1, 11, 21, 29)] == [1.0] * 4
    assert lr_at(10) < 0.05
    assert lr_at(40) < 0.05
    plain = warm_up_and_decay("cosine", peak=1.0, steps=40, warmup=0.1)
    one = in_cycles(lambda n: warm_up_and_decay("cosine", peak=1.0, steps=n, warmup=0.1), 40, ())
    assert [one(step) for step in range(1, 41)] == [plain(step) for step in range(1, 41)]


def test_cyclic_prunes_twice():
    run = Run("cyclic", cycles=3, start_sparsity=0.5, freeze_last=0.25)
    assert run.course.sparsifier.cycles == (10, 20, 30)
    run.train(1, 29)
    assert run.course.sparsity == 0.5
    run.train(30, 30)
    assert run.course.sparsity == 0.75


# --- str


def test_soft_threshold_is_the_proximal_map_of_the_absolute_value():
    w = torch.tensor([-2.0, -0.5, 0.3, 1.0])
    kept = torch.tensor([True, False, False, True])
    assert torch.equal(
        soft_threshold(w, kept, torch.tensor(0.5)), torch.tensor([-1.5, 0.0, 0.0, 0.5])
    )


def test_str_follows_the_schedule_exactly_in_the_forward_pass():
    run = Run("str", update_every=0.1, allocation="uniform")
    for step in range(1, STEPS + 1):
        run.train(step, step)
        run.course.before_step(step + 1)
        if step % 4 == 0 or step >= 28:
            due = run.course.sparsifier.num_zeros_due(min(step, 28))
            assert run.zeros == due


def test_str_passes_the_gradient_straight_where_the_weight_lives():
    run = Run("str", update_every=0.1)
    run.train(1, 12)
    run.course.before_step(13)
    param, latent = run.targets.params[0], run.course.params[0]
    param.grad = torch.ones_like(param)
    run.course.after_backward(13)
    assert torch.equal(latent.grad, (param != 0).float())
    assert (latent[param == 0] != 0).any()


# --- factors


def test_factors_multiply_to_the_weights():
    w = torch.tensor([-2.0, -1e-4, 0.0, 0.7])
    for split in (balanced, unbalanced):
        m, v = split(w)
        torch.testing.assert_close(m * v, w)
    m, v = unbalanced(w)
    torch.testing.assert_close(m**2 - v**2, torch.ones(4))
    m, v = balanced(w)
    torch.testing.assert_close(m.abs(), v.abs())


@pytest.mark.parametrize("method", ["spred", "pilot", "sign-in"])
def test_the_gradients_of_factors_are_those_of_autograd(method):
    run = Run(method, regularisation=0.1)
    run.course.before_step(1)
    x = torch.randn(5, 8)
    run.model(x).square().sum().backward()
    run.course.after_backward(1)
    (m, v), _ = run.course.pairs
    penalty = 0.0 if method == "sign-in" else 0.1
    a, b = m.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
    state = {name: tensor.detach() for name, tensor in run.model.named_parameters()}
    out = torch.func.functional_call(run.model, state | {"first.weight": a * b}, (x,))
    (out.square().sum() + penalty * (a.square().sum() + b.square().sum())).backward()
    torch.testing.assert_close(m.grad, a.grad)
    torch.testing.assert_close(v.grad, b.grad)


def test_sign_in_rescales_with_the_weights_kept():
    run = Run("sign-in", rescale_every=0.25)
    run.train(1, 9)
    (m, v), _ = run.course.pairs
    assert not torch.allclose(m**2 - v**2, torch.ones_like(m), atol=1e-4)
    run.train(10, 10)
    torch.testing.assert_close((m**2 - v**2).detach(), torch.ones_like(m))
    torch.testing.assert_close((m * v).detach(), run.targets.params[0].detach())


def test_the_penalty_of_pilot_is_steered_and_that_of_spred_is_not():
    runs = {name: Run(name, regularisation=1e-4).train(1, 20) for name in ("pilot", "spred")}
    found = {name: float(run.course.state()["penalty"]) for name, run in runs.items()}
    assert found["spred"] == 1e-4
    assert found["pilot"] > 1e-4


def test_factors_are_pairs_that_bar_can_balance():
    run = Run("spred")
    assert isinstance(run.course, Factors)
    assert len(run.course.pairs) == 2
    assert Run("gradual").course.pairs == []


# --- ast


def test_gradient_correction_by_hand():
    g, p = [torch.tensor([1.0, -2.0])], [torch.tensor([0.0, 1.0])]
    (made,) = corrected(g, p)
    assert torch.equal(made, torch.tensor([1.0, 0.0]))
    (same,) = corrected(g, [torch.tensor([1.0, 0.0])])
    assert torch.equal(same, g[0])
    # over all tensors as one vector
    made = corrected([g[0], torch.tensor([5.0])], [p[0], torch.tensor([1.0])])
    assert torch.equal(made[1], torch.tensor([5.0]))


def test_ast_gives_nested_models_with_statistics_of_their_own():
    run = Run("ast", levels=[0.25, 0.5, 0.75]).train()
    course = run.course
    assert isinstance(course, Levels)
    found, statistics = [], []
    for level, sparsity in enumerate((0.25, 0.5, 0.75)):
        course.finish_level(level)
        assert run.zeros == num_zeros(sparsity, run.targets.total)
        assert num_dropped(course.sparsifier.masks) == run.zeros
        found.append([param != 0 for param in run.targets.params])
        statistics.append(run.model.norm.running_mean.clone())
    for denser, sparser in itertools.pairwise(found):
        assert all(not (s & ~d).any() for s, d in zip(sparser, denser, strict=True))
    assert not torch.equal(statistics[0], statistics[2])


def test_a_plain_course_trains_the_models_own_weights():
    run = Run("gradual")
    assert type(run.course) is Course
    assert all(a is b for a, b in zip(run.course.params, run.targets.params, strict=True))
