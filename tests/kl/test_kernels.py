"""The C++ kernels against the definitions in fp64: every instruction set, dtype and size of vocabulary.

Tolerances (docs/kl.md): a divergence to 3e-7 + 1e-6 of itself. A gradient, before it is rounded to the logits' dtype, to
4e-7 (1 + |log p|) of the products that it is a difference of: p (1 + |log ratio| + divergence), p the larger of the probabilities.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pymerge import native, native_kl, reference_kl
from tests.kl.conftest import DTYPES, KINDS, logits
from tests.oracles import kl as oracle

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check(student, teacher, kind, beta=0.5, temperature=1.0):
    """Both passes of the C++ core on [rows, vocab] against autograd through the oracle."""
    grad = torch.linspace(-1, 2, student.shape[0])
    s, t = student.double().requires_grad_(), teacher.double().requires_grad_()
    want = oracle.divergence(s, t, kind, beta, temperature)
    want.backward(grad.double())
    got, stats = native_kl.forward(student, teacher, kind, beta, temperature)
    torch.testing.assert_close(got.double(), want.detach().clamp(min=0), rtol=1e-6, atol=3e-7)
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    for x, of_teacher in ((s, False), (t, True)):
        gradient = native_kl.backward(student, teacher, stats, grad, kind, beta, temperature, None, of_teacher)
        assert gradient.dtype == (teacher if of_teacher else student).dtype
        factor = (1 + (log_q - log_p).abs() + got[:, None]) * grad.abs()[:, None] / temperature
        p = torch.maximum(log_q.exp() * (1 - log_q), log_p.exp() * (1 - log_p))
        allowed = ((4e-7 * p + math.exp(-86)) * factor).detach()  # probabilities below exp(-86) count as 0
        if gradient.dtype == torch.float16:
            allowed += 2**-24  # subnormal steps
        error = (gradient.double() - x.grad).abs()
        assert (error <= allowed + ROUNDING[gradient.dtype] * x.grad.abs()).all(), (error / allowed).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 31, 32, 33, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(isa, kind, vocab, dtype):
    check(*logits(5, vocab, seed=vocab, dtype=dtype), kind, beta=0.3, temperature=0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabulary(isa, kind):
    check(*logits(2, 300_000, dtype=torch.bfloat16), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes(isa, kind):
    for a in DTYPES:
        for b in DTYPES:
            student, teacher = logits(2, 70)
            check(student.to(a), teacher.to(b), kind)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_temperatures_and_spreads(kind, temperature):
    for spread in (0.01, 1.0, 30.0):
        check(*logits(4, 3000, spread=spread), kind, 0.1, temperature)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_order_raise_the_maximum_in_every_block(isa, kind):
    for sign in (1, -1):
        rising = torch.linspace(-300, 300, 10_000)[None] * sign
        other = rising / 2 + torch.sin(torch.arange(10_000.0))
        check(rising, other, kind)
        check(other, rising, kind)


@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.5, 0.99])
def test_beta(beta):
    check(*logits(4, 500, apart=3.0), "jsd", beta)


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_keep_their_digits(kind):
    """bf16 logits one rounding apart: a divergence of 1e-5 to 1 % at least."""
    student, _ = logits(4, 32_000, dtype=torch.bfloat16)
    teacher = (student.float() * 1.004).bfloat16()
    want = oracle.divergence(student, teacher, kind)
    assert want.max() < 2e-4
    torch.testing.assert_close(native_kl.forward(student, teacher, kind)[0].double(), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_give_exactly_nothing(isa, kind):
    student, _ = logits(3, 5000, dtype=torch.bfloat16)
    loss, stats = native_kl.forward(student, student.clone(), kind, 0.3, 0.7)
    assert torch.equal(loss, torch.zeros(3))
    for of_teacher in (False, True):
        gradient = native_kl.backward(student, student.clone(), stats, torch.ones(3), kind, 0.3, 0.7, None, of_teacher)
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bytes(kind):
    student, teacher = logits(50, 3001, dtype=torch.float16)
    grad, weight = torch.linspace(-1, 1, 50), torch.linspace(0, 2, 50)
    student[0, :40] = teacher[1, 5:9] = -math.inf
    results = []
    for name in native.available_isas():
        native.use_isa(name)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, stats = native_kl.forward(student, teacher, kind, 0.4, 1.3, weight)
            passes = [native_kl.backward(student, teacher, stats, grad, kind, 0.4, 1.3, weight, t) for t in (False, True)]
            results.append((loss, stats, *passes))
    native.use_isa("")
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))


# --------------------------------------------------------------------------------------------------------------------------------------
# -inf, NaN, masks: the C++ core and the oracle alike


@pytest.fixture(params=["reference", "native"])
def backend(request):
    return {"reference": reference_kl, "native": native_kl}[request.param]


INF = math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [8, 1500])
def test_masked_vocabulary_is_as_if_it_were_not_there(backend, kind, vocab):
    """-inf in both: also at the start of the row, and over whole blocks."""
    student, teacher = logits(3, vocab)
    padded = [torch.cat([torch.full((3, 1100), -INF), x, torch.full((3, 3), -INF)], dim=1) for x in (student, teacher)]
    loss, stats = backend.forward(student, teacher, kind, 0.3)
    loss_padded, stats_padded = backend.forward(*padded, kind, 0.3)
    torch.testing.assert_close(loss_padded, loss, rtol=1e-6, atol=1e-7)
    grad = torch.ones(3)
    for of_teacher in (False, True):
        plain = backend.backward(student, teacher, stats, grad, kind, 0.3, of_teacher=of_teacher)
        gradient = backend.backward(*padded, stats_padded, grad, kind, 0.3, of_teacher=of_teacher)
        torch.testing.assert_close(gradient[:, 1100:-3], plain, rtol=1e-5, atol=1e-7)
        assert torch.equal(gradient[:, :1100], torch.zeros(3, 1100)) and torch.equal(gradient[:, -3:], torch.zeros(3, 3))


def test_support_of_one_inside_the_others(backend):
    """p on two entries, q on three: KL(p||q) is finite, KL(q||p) infinite, and the mixture sees both."""
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -INF]])
    forward, stats = backend.forward(student, teacher, "forward")
    assert forward.item() == pytest.approx(math.log(3 / 2), abs=1e-6)
    gradient = backend.backward(student, teacher, stats, torch.ones(1), "forward")
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))
    reverse, stats = backend.forward(student, teacher, "reverse")
    assert reverse.item() == INF
    assert backend.backward(student, teacher, stats, torch.ones(1), "reverse").isnan().all()
    jsd, stats = backend.forward(student, teacher, "jsd", 0.5)
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.full((3,), 1 / 3)
    m = (p + q) / 2
    want = 0.5 * (p[:2] * (p / m).log()[:2]).sum() + 0.5 * (q * (q / m).log()).sum()
    assert jsd.item() == pytest.approx(want.item(), abs=1e-6)
    assert backend.backward(student, teacher, stats, torch.ones(1), "jsd").isfinite().all()


@pytest.mark.parametrize("position", [0, 1030, 2500])
def test_infinite_wherever_it_happens(backend, position):
    """Also where the probability is far too small for fp32, and where larger logits follow that rescale every sum."""
    teacher, student = torch.linspace(-400, 400, 2501)[None], torch.zeros(1, 2501)
    student[0, position] = -INF
    assert backend.forward(student, teacher, "forward")[0].item() == INF
    assert backend.forward(teacher, student, "reverse")[0].item() == INF
    assert backend.forward(student, teacher, "jsd")[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_row_stays_in_that_row(backend, kind):
    for bad in (math.nan, INF):
        for which in (0, 1):
            pair = logits(3, 1200)
            pair[which][1, 1100] = bad
            loss, stats = backend.forward(*pair, kind)
            assert loss.isnan().tolist() == [False, True, False]
            gradient = backend.backward(*pair, stats, torch.ones(3), kind)
            assert gradient.isnan().any(dim=1).tolist() == [False, True, False]


def test_nan_among_minus_infinity(backend):
    student, teacher = torch.full((1, 2100), -INF), torch.zeros(1, 2100)
    student[0, 2000:], student[0, 5] = 0.0, math.nan
    for pair in ((student, teacher), (teacher, student)):
        for kind in KINDS:
            assert backend.forward(*pair, kind)[0].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_distribution_at_all(backend, kind):
    nothing = torch.full((1, 40), -INF)
    assert backend.forward(nothing, torch.zeros(1, 40), kind)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_are_nothing_even_if_nan(backend, kind, dtype):
    student, teacher = logits(4, 1500, dtype=dtype)
    full, _ = backend.forward(student, teacher, kind)
    student[1], teacher[3, 7] = math.nan, INF
    weight = torch.tensor([1.0, 0.0, 0.25, 0.0])
    loss, stats = backend.forward(student, teacher, kind, weight=weight)
    torch.testing.assert_close(loss, torch.stack([full[0], torch.zeros(()), full[2] / 4, torch.zeros(())]), rtol=1e-6, atol=1e-7)
    for of_teacher in (False, True):
        gradient = backend.backward(student, teacher, stats, torch.ones(4), kind, weight=weight, of_teacher=of_teacher)
        assert gradient[[1, 3]].count_nonzero() == 0 and gradient.isfinite().all()
        one = backend.backward(student[2:3], teacher[2:3], stats[2:3], torch.full((1,), 0.25), kind, of_teacher=of_teacher)
        torch.testing.assert_close(gradient[2:3], one)


def test_no_rows():
    empty = torch.empty(0, 5)
    loss, stats = native_kl.forward(empty, empty, "jsd")
    assert loss.shape == (0,)
    assert native_kl.backward(empty, empty, stats, loss, "jsd").shape == (0, 5)


# --------------------------------------------------------------------------------------------------------------------------------------
# Properties

VALUES = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([0.0, -0.0, 1e-40, 5.0, -INF]))


@given(st.data(), st.sampled_from(KINDS), st.integers(1, 70), st.floats(0.01, 0.99), st.floats(0.2, 5))
def test_agrees_with_the_oracle_on_any_logits(data, kind, vocab, beta, temperature):
    row = st.lists(VALUES, min_size=vocab, max_size=vocab)
    student, teacher = (torch.tensor([data.draw(row)]) for _ in range(2))
    want, _ = reference_kl.forward(student.double(), teacher.double(), kind, beta, temperature)
    got, stats = native_kl.forward(student, teacher, kind, beta, temperature)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=5e-7, equal_nan=True)
    if want.isfinite().all():
        gradient = native_kl.backward(student, teacher, stats, torch.ones(1), kind, beta, temperature)
        # The softmax's gradient along (1, ..., 1) is 0: adding a constant to logits changes nothing.
        assert abs(gradient.sum().item()) <= 1e-5 * (1 + gradient.abs().sum().item())


@given(st.integers(0, 2**31), st.integers(1, 2000), st.floats(0.05, 0.95))
def test_divergences_are_related_as_they_must_be(seed, vocab, beta):
    student, teacher = logits(2, vocab, seed=seed)

    def d(a, b, kind, beta=beta):
        return native_kl.forward(a, b, kind, beta)[0]

    torch.testing.assert_close(d(student, teacher, "forward"), d(teacher, student, "reverse"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d(student, teacher, "jsd"), d(teacher, student, "jsd", 1 - beta), rtol=1e-5, atol=1e-6)
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert (d(student, teacher, "jsd") <= entropy + 1e-6).all()
