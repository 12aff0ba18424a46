"""The list forms against the rule in float64, and their base steps against torch's fused ones."""

import math

import pytest
import torch

from hamcli import native
from hamcli.optim import cpu, fused, ham_step_, jit, plain, rule
from tests.optim.numbers import bits, normal, ulps

# 63: whole vectors of eight or sixteen, half a vector of sixteen, and a rest
SHAPES = [(70, 513), (33,), (1, 1), (0, 3), (5, 4, 3, 3), (3, 21)]
FORMS = {"cpu": cpu, "rule": plain, "fused": fused, "numba": jit}
# whose base steps are torch's fused ones in bits
AS_FUSED = {name: FORMS[name] for name in ("cpu", "fused", "numba")}
IN_ONE_PASS = ("fused", "numba")
ADAM = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
SGD = {"lr": 0.1}


@pytest.fixture(autouse=True)
def _extension(request):
    spec = getattr(request.node, "callspec", None)
    form = FORMS.get(spec.params.get("form")) if spec is not None else None
    for one, status in ((fused, native.status), (jit, jit.status)):
        if form is one and not one.is_usable():
            pytest.skip(status().reason)


def weights(dtype=torch.float32):
    return [normal(*shape, seed=i, scale=0.05, dtype=dtype) for i, shape in enumerate(SHAPES)]


def gradients(step, scale=1e-3, dtype=torch.float32):
    return [
        normal(*shape, seed=100 * step + i, scale=scale, dtype=dtype)
        for i, shape in enumerate(SHAPES)
    ]


def some_masks():
    return [normal(*shape, seed=50 + i) > 0 if i != 1 else None for i, shape in enumerate(SHAPES)]


def run_adam(form, ws, steps, *, decoupled=True, weight_decay=0.0, alpha=0.0, beta=0.0, clamp=5.0,
             masks=None, rounded=None, sums=None, grads=gradients, beta1=0.9):  # fmt: skip
    """`steps` steps of a form; returns the first moments."""
    m, v = [torch.zeros_like(w) for w in ws], [torch.zeros_like(w) for w in ws]
    counts = [torch.zeros(()) for _ in ws]
    for step in range(1, steps + 1):
        for count in counts:
            count.fill_(step)
        form.adam_ham_(
            ws, grads(step), m, v, counts, masks=masks or [None] * len(ws),
            rounded=rounded or [None] * len(ws), a=[1e-2 * alpha] * len(ws), b=1e-2 * beta,
            clamp=clamp, weight_decay=weight_decay, decoupled=decoupled, sums=sums,
            **{**ADAM, "beta1": beta1},
        )  # fmt: skip
    return m


def exact_adam(ws, steps, *, decoupled, weight_decay, alpha, beta, clamp=5.0, masks=None):
    ws = [w.double() for w in ws]
    state = [(torch.zeros_like(w), torch.zeros_like(w)) for w in ws]
    for step in range(1, steps + 1):
        for i, g in enumerate(gradients(step)):
            g, mask = g.double(), None if masks is None else masks[i]
            w, m, v = rule.adam_step(
                ws[i], g, *state[i], step=step, weight_decay=weight_decay, decoupled=decoupled,
                **ADAM,
            )  # fmt: skip
            w = rule.mirror_step(w, g, lr=1e-2, alpha=alpha, beta=beta, clamp=clamp)
            ws[i], state[i] = rule.masked(w, mask), (rule.masked(m, mask), v)
    return ws


def run_sgd(form, ws, steps, *, momentum, nesterov, weight_decay, alpha=0.0, beta=0.0, masks=None):
    buffers = [torch.full_like(w, math.nan) if momentum else None for w in ws]
    for step in range(1, steps + 1):
        form.sgd_ham_(
            ws, gradients(step), buffers, masks=masks or [None] * len(ws), rounded=[None] * len(ws),
            a=[0.1 * alpha] * len(ws), b=0.1 * beta, clamp=5.0, momentum=momentum,
            nesterov=nesterov, weight_decay=weight_decay, is_first_step=step == 1, **SGD,
        )  # fmt: skip
    return buffers


@pytest.mark.parametrize("form", AS_FUSED)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_without_alpha_and_beta_adam_is_torch_fused_bit_for_bit(
    form, threads, decoupled, weight_decay, beta1
):
    torch.set_num_threads(threads)
    ours, theirs = weights(), [torch.nn.Parameter(w) for w in weights()]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(theirs, lr=1e-2, weight_decay=weight_decay, betas=(beta1, 0.999), fused=True)
    run_adam(AS_FUSED[form], ours, 20, decoupled=decoupled, weight_decay=weight_decay, beta1=beta1)
    for step in range(1, 21):
        for param, g in zip(theirs, gradients(step), strict=True):
            param.grad = g
        optimizer.step()
    assert all(torch.equal(o, t) for o, t in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", AS_FUSED)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_without_alpha_and_beta_sgd_is_torch_fused_bit_for_bit(
    form, threads, momentum, nesterov, weight_decay
):
    torch.set_num_threads(threads)
    ours, theirs = weights(), [torch.nn.Parameter(w) for w in weights()]
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD(theirs, lr=0.1, fused=True, **options)
    run_sgd(AS_FUSED[form], ours, 20, **options)
    for step in range(1, 21):
        for param, g in zip(theirs, gradients(step), strict=True):
            param.grad = g
        optimizer.step()
    assert all(torch.equal(o, t) for o, t in zip(ours, theirs, strict=True))


def assert_close_to_rule(found, exact):
    """Twenty steps of two roundings of the weight each, and more of what is added to it."""
    found = torch.cat([w.flatten() for w in found])
    exact = torch.cat([w.flatten() for w in exact])
    # in units of the scale of the weights, 0.05: near zero a relative error means nothing
    error = (found.double() - exact).abs() / 0.05
    assert error.median() < 2**-22
    # where Adam divides by a root near eps, or a sign differs at a crossing, a few may be further
    assert (error > 40 * 2**-23).double().mean() < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("has_masks", [False, True])
def test_twenty_adam_steps_follow_the_rule(form, decoupled, has_masks):
    options = {"decoupled": decoupled, "weight_decay": 0.1, "alpha": 100.0, "beta": 1e-2,
               "masks": some_masks() if has_masks else None}  # fmt: skip
    found = weights()
    run_adam(FORMS[form], found, 20, **options)
    assert_close_to_rule(found, exact_adam(weights(), 20, **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_twenty_sgd_steps_follow_the_rule(form, momentum, nesterov):
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 0.1}
    found, masks = weights(), some_masks()
    run_sgd(FORMS[form], found, 20, alpha=20.0, beta=1e-2, masks=masks, **options)
    exact = [w.double() for w in weights()]
    buffers = [None] * len(exact)
    for step in range(1, 21):
        for i, g in enumerate(gradients(step)):
            w, buffer = rule.sgd_step(exact[i], g.double(), buffers[i], lr=0.1, **options)
            w = rule.mirror_step(w, g.double(), lr=0.1, alpha=20.0, beta=1e-2)
            exact[i] = rule.masked(w, masks[i])
            buffers[i] = None if buffer is None else rule.masked(buffer, masks[i])
    assert_close_to_rule(found, exact)


@pytest.mark.parametrize("form", FORMS)
def test_dropped_weights_and_their_momentum_are_plain_zero(form):
    masks = some_masks()
    for grads in (gradients, lambda step: [torch.full_like(w, math.nan) for w in weights()]):
        ws = weights()
        m = run_adam(FORMS[form], ws, 2, weight_decay=0.1, alpha=9.0, masks=masks, grads=grads)
        for tensor, mask in zip([*ws, *m], [*masks, *masks], strict=True):
            if mask is not None:
                assert not bits(tensor)[~mask].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_the_rounded_masters(form, low):
    masters = weights()
    rounded = [w.to(low) for w in masters]

    def grads(step):
        return gradients(step, dtype=low)

    run_adam(FORMS[form], masters, 5, alpha=100.0, rounded=rounded, grads=grads)
    alone = weights()
    run_adam(
        FORMS[form], alone, 5, alpha=100.0, grads=lambda step: [g.float() for g in grads(step)]
    )
    for master, copy, wide in zip(masters, rounded, alone, strict=True):
        assert torch.equal(copy, master.to(low))
        assert torch.equal(master, wide)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clamp", [0.001, 5.0])
def test_a_measured_step_changes_no_bit_and_counts_right(form, clamp):
    masks = some_masks()
    masks[0][:, :100] = True
    plain_ws, measured = weights(), weights()
    for ws in (plain_ws, measured):
        ws[0][0] = 0.0  # natural zeros do not count
    grads = [g * (w != 0) for g, w in zip(gradients(1), plain_ws, strict=True)]
    options = {"alpha": 100.0, "beta": 1e-2, "clamp": clamp, "masks": masks}
    options["grads"] = lambda step: grads
    sums = torch.zeros(cpu.NUM_SUMS, dtype=torch.float64)
    exact = exact_exponents(measured, grads, masks, clamp)
    run_adam(FORMS[form], measured, 1, sums=sums, **options)
    run_adam(FORMS[form], plain_ws, 1, **options)
    assert all(torch.equal(p, m) for p, m in zip(plain_ws, measured, strict=True))
    total, moved, clamped, count, greatest = sums.tolist()
    assert count == len(exact)
    assert total == pytest.approx(float(exact.sum()), rel=1e-5)
    assert greatest == pytest.approx(float(exact.max()), rel=1e-6)
    assert clamped == (exact >= clamp).sum()
    assert moved == count  # every exponent is at least 1e-5, far above fp32's resolution


def exact_exponents(ws, grads, masks, clamp):
    """|e| of the first step of AdamW, over what is kept and not zero."""
    found = []
    for w, g, mask in zip(ws, grads, masks, strict=True):
        w, g = w.double(), g.double()
        made, _, _ = rule.adam_step(
            w, g, torch.zeros_like(w), torch.zeros_like(w), step=1, weight_decay=0.0,
            decoupled=True, **ADAM,
        )  # fmt: skip
        e = rule.exponent(made, g, a=1e-2 * 100.0, b=1e-2 * 1e-2, clamp=clamp).abs()
        found.append(e[(made != 0) & (mask if mask is not None else True)])
    return torch.cat(found)


@pytest.mark.parametrize("form", FORMS)
def test_memory_layout_changes_no_result(form):
    plain_w, g = normal(4, 6, 3, 5, seed=0), normal(4, 6, 3, 5, seed=1, scale=1e-3)
    gaps = torch.zeros(4, 12, 3, 5)[:, ::2]
    layouts = {
        "channels last": plain_w.clone(memory_format=torch.channels_last),
        "transposed": plain_w.clone().transpose(0, 3).contiguous().transpose(0, 3),
        "with gaps": gaps.copy_(plain_w),
        "plain": plain_w.clone(),
    }
    mask = normal(4, 6, 3, 5, seed=2) > 0
    for w in layouts.values():
        run_adam(FORMS[form], [w], 3, alpha=50.0, beta=1e-2, masks=[mask], grads=lambda step: [g])
    for name, w in layouts.items():
        # torch's fused step does the last few elements of a tensor in double
        assert (w - layouts["plain"]).abs().max() < 1e-6, name
        assert torch.equal(w == 0, ~mask), name


def test_blocks_change_no_bit(monkeypatch):
    whole, cut = weights(), weights()
    run_adam(cpu, whole, 3, alpha=100.0, beta=1e-2)
    monkeypatch.setattr(cpu, "BLOCK", 256)
    run_adam(cpu, cut, 3, alpha=100.0, beta=1e-2)
    assert all(torch.equal(w, c) for w, c in zip(whole, cut, strict=True))


def test_float32_mirror_step_rounds_once():
    w, g = normal(1_000_000, seed=0), normal(1_000_000, seed=1, scale=1e-2)
    exact = rule.mirror_step(w.double(), g.double(), lr=1e-3, alpha=200.0, beta=1e-3)
    ham_step_([w], [g], lr=1e-3, alpha=200.0, beta=1e-3)
    # the write-back costs half an ulp, expm1 0.02; w * exp(e) would be over one ulp on 2 %
    assert ulps(w, exact).max() < 0.6


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_float32_mirror_step_keeps_its_digits_at_large_exponents(scale):
    w, g = normal(100_000, seed=0), normal(100_000, seed=1, scale=scale)
    exact = rule.mirror_step(w.double(), g.double(), lr=0.1, alpha=10.0, beta=0.0)
    ham_step_([w], [g], lr=0.1, alpha=10.0, beta=0.0)
    # an exponent of 5 carries an error of 2^-22.7 itself; w + w * expm1(e) alone gives 70 ulp
    assert ulps(w, exact).max() < 6.0


@pytest.mark.parametrize("limit", [limit for limit, _ in cpu.POLYNOMIALS])
def test_float32_mirror_step_is_exact_up_to_the_limit_of_each_polynomial(limit):
    w, g = normal(100_000, seed=0), normal(100_000, seed=1, scale=limit)
    exact = rule.mirror_step(w.double(), g.double(), lr=1.0, alpha=1.0, beta=0.0, clamp=limit)
    ham_step_([w], [g], lr=1.0, alpha=1.0, beta=0.0, clamp=limit)
    # half an ulp for the write-back, `limit` for the rounding of the factor, a tenth for its end
    assert ulps(w, exact).max() < 0.6 + 2 * limit


def test_large_exponents_of_one_sign_are_exact():
    w = normal(10_000, seed=0)
    exact = rule.mirror_step(w.double(), torch.zeros(()).double(), lr=1.0, alpha=0.0, beta=0.4)
    ham_step_([w], [torch.zeros_like(w)], lr=1.0, alpha=0.0, beta=0.4)
    assert ulps(w, exact).max() < 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_mirror_step_rounds_once(dtype):
    w, g = normal(100_000, seed=0, dtype=dtype), normal(100_000, seed=1, dtype=dtype)
    exact = rule.mirror_step(w.double(), g.double(), lr=0.1, alpha=2.0, beta=1e-3)
    ham_step_([w], [g], lr=0.1, alpha=2.0, beta=1e-3)
    assert ulps(w, exact).max() < 0.501


def test_zeros_stay_zero_and_the_mirror_step_flips_no_sign():
    w = torch.tensor([[0.0, -1.0, 2.0, -3e-38, 1e-45]])
    before = w.clone()
    for gradient in (1e9, -1e9):
        ham_step_([w], [torch.full_like(w, gradient)], lr=1.0, alpha=200.0, beta=1.0)
        assert not (torch.sign(w) == -torch.sign(before))[before != 0].any()
        assert w[0, 0] == 0


def test_without_a_gradient_only_the_mask_acts():
    w = torch.ones(4)
    ham_step_([w], [None], lr=1.0, alpha=1.0, beta=1.0, masks=[torch.tensor([1, 0, 1, 0]) == 1])
    assert w.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("form", AS_FUSED)
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_are_over_what_is_kept(form, has_mask, dtype):
    g = normal(300, 301, seed=0, dtype=dtype)
    mask = normal(301, 300, seed=1).T > 1 if has_mask else None
    kept = g.double() if mask is None else g.double()[mask]
    (found,) = AS_FUSED[form].kept_norms([g], [mask])
    magnitudes, squares, count = found
    assert count == kept.numel()
    assert magnitudes == pytest.approx(float(kept.abs().sum()), rel=1e-5)
    assert squares == pytest.approx(float(kept.square().sum()), rel=1e-5)


# --- the forms of one pass


def times_exp(form, w, e, clamp):
    """The weights times exp(e), by a base step with a learning rate of 0."""
    made = w.clone()
    gradient = torch.where(w < 0, e, -e)
    FORMS[form].sgd_ham_(
        [made], [gradient], [None], masks=[None], rounded=[None], a=[1.0], b=0.0, clamp=clamp,
        lr=0.0, momentum=0.0, nesterov=False, weight_decay=0.0, is_first_step=True,
    )  # fmt: skip
    return made


@pytest.mark.parametrize("form", IN_ONE_PASS)
@pytest.mark.parametrize(
    ("greatest", "bound"),
    # half an ulp for the last rounding; in ulps of a product just below a power of two, those of
    # exp(e) - 1 (2^-28 up to 1/8, 2^-26 up to ln(2)/2), of its polynomial, and of what is left of
    # e after whole powers of two (2^-26 twice)
    [(0.125, 0.6), (87.0, 1.25)],
)
def test_exponential_keeps_its_error_bound(form, greatest, bound):
    # all binary orders from 2^-30 up, both signs, every mantissa of 12 bits
    orders = torch.arange(-30, math.ceil(math.log2(greatest)) + 1, dtype=torch.float64)
    grid = torch.outer(2.0**orders, 1 + torch.arange(4096, dtype=torch.float64) / 4096).flatten()
    e = torch.cat([grid, -grid])[:, None].expand(-1, 5).flatten().float()
    e = e[e.abs() <= greatest]
    w = normal(len(e), seed=0, scale=1e-2)
    exact = w.double() * torch.exp(e.double())
    is_normal = exact.abs() > torch.finfo(torch.float32).tiny
    assert ulps(times_exp(form, w, e, greatest), exact)[is_normal].max() < bound


@pytest.mark.parametrize("form", IN_ONE_PASS)
def test_exponents_of_one_vector_may_be_small_and_large(form):
    e = torch.tensor([1e-8, 3.0, -3.0, 0.0, 0.125, -0.1250001, 4.9, -80.0, math.nan])
    w = torch.full_like(e, -2.0)
    exact = w.double() * torch.exp(e.double().clamp(-5, 5))
    made = times_exp(form, w, e, 5.0)
    assert ulps(made, exact)[:-1].max() < 1.25
    assert made[-1].isnan()


@pytest.mark.parametrize("form", IN_ONE_PASS)
def test_what_one_pass_does_not_take_goes_elsewhere(form):
    mixed = [normal(9, 9, seed=i, dtype=t) for i, t in enumerate((torch.float64, torch.float32))]
    plain_ws = [w.clone() for w in mixed]
    grads = [normal(9, 9, seed=5, dtype=torch.float64), normal(9, 9, seed=6, dtype=torch.bfloat16)]
    for which, ws in ((FORMS[form], mixed), (cpu, plain_ws)):
        run_adam(which, ws, 2, alpha=2.0, grads=lambda step: grads)
    assert all(torch.equal(one, other) for one, other in zip(mixed, plain_ws, strict=True))


@pytest.mark.parametrize("form", IN_ONE_PASS)
def test_threads_change_no_bit(form):
    made, sums = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ws = [normal(300, 311, seed=0), *weights()]
        sums.append(torch.zeros(cpu.NUM_SUMS, dtype=torch.float64))
        grads = [normal(300, 311, seed=1, scale=1e-3), *gradients(1)]
        run_adam(
            FORMS[form], ws, 2, alpha=100.0, beta=1e-2, sums=sums[-1], grads=lambda step, g=grads: g
        )
        made.append(ws)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert torch.equal(*sums)


@pytest.mark.parametrize(
    ("param", "grad", "mask", "named"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), None, r"gradient has shape \(3, 2\)"),
        (torch.ones(2, 3), torch.ones(2, 3).to_sparse(), None, "sparse"),
        (torch.ones(2, 3), None, torch.ones(1, dtype=torch.bool), r"mask has shape \(1,\)"),
        (torch.ones(2, 3), None, torch.ones(2, 3), "mask is torch.float32"),
        (torch.ones(2, 3, dtype=torch.int32), None, None, "torch.int32"),
        (torch.ones(2, 3, dtype=torch.complex64), None, None, "torch.complex64"),
    ],
)
def test_the_mirror_step_alone_refuses_what_does_not_fit_before_it_writes(param, grad, mask, named):
    first, before = torch.ones(2, 2), param.clone()
    with pytest.raises(ValueError, match=named):
        ham_step_(
            [first, param], [torch.ones(2, 2), grad], lr=1.0, alpha=1.0, beta=1.0,
            masks=[None, mask],
        )  # fmt: skip
    assert torch.equal(first, torch.ones(2, 2))
    assert torch.equal(param, before)
