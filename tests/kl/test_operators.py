"""torch.ops.pymerge.kl_divergence: autograd, torch.library's checks, torch.compile, shapes, masks, errors."""

import pytest
import torch

import pymerge
from pymerge import kl_ops  # noqa: F401  registers the operators
from tests.kl.conftest import KINDS, logits
from tests.oracles import kl as oracle

OP = torch.ops.pymerge.kl_divergence
MASK = torch.tensor([[True, False, True], [True, True, True]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("each_backend")
def test_autograd_gives_both_gradients(kind, dtype):
    student, teacher = (x.requires_grad_() for x in logits(2, 3, 50, dtype=dtype))
    s, t = (x.detach().double().requires_grad_() for x in (student, teacher))
    loss = OP(student, teacher, kind, 0.3, 2.0, MASK)
    assert loss.shape == (2, 3) and loss.dtype == torch.float32
    want = oracle.divergence(s, t, kind, 0.3, 2.0) * MASK
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=5e-7)
    loss.square().sum().backward()
    want.square().sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    for x, y in ((student, s), (teacher, t)):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), y.grad, **tolerance)
        assert x.grad[0, 1].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_fp64(kind):
    student, teacher = (x.double().requires_grad_() for x in logits(3, 7))
    weight = torch.tensor([1.0, 0.0, 0.5])
    assert torch.autograd.gradcheck(lambda s, t: OP(s, t, kind, 0.3, 1.7, weight), (student, teacher))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("each_backend")
def test_opcheck(kind):
    student, teacher = logits(2, 3, 20, dtype=torch.bfloat16)
    for needs in (True, False):
        torch.library.opcheck(OP.default, (student.clone().requires_grad_(), teacher.clone().requires_grad_(needs), kind, 0.3, 2.0, MASK))
    forward = torch.ops.pymerge.kl_divergence_forward.default
    torch.library.opcheck(forward, (student.clone().requires_grad_(), teacher, kind, 0.3, 2.0, MASK))
    loss, stats = forward(student, teacher, kind, 0.3, 2.0, MASK)
    choices = (kind, 0.3, 2.0, MASK)
    torch.library.opcheck(torch.ops.pymerge.kl_divergence_backward.default, (student, teacher, stats, loss, *choices, True))
    torch.library.opcheck(torch.ops.pymerge.kl_divergence_backward_.default, (student.clone(), teacher, stats, loss, *choices))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend):
    student, teacher = logits(2, 3, 40)
    student.requires_grad_()

    def function(s, t, mask):
        return OP(s * 1.5, t, "reverse", 0.5, 1.0, mask).sum() + OP(s, t, "jsd").mean()

    torch._dynamo.reset()
    want = torch.autograd.grad(function(student, teacher, MASK), student)[0]
    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend=backend)(student, teacher, MASK), student)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("each_backend")
def test_gradient_written_over_the_logits_is_the_same(kind):
    for student, teacher in (logits(3, 2500, dtype=torch.bfloat16), [x.t() for x in logits(50, 3)]):
        loss, stats = torch.ops.pymerge.kl_divergence_forward(student, teacher, kind)
        grad = torch.linspace(1, 2, 3)
        want = torch.ops.pymerge.kl_divergence_backward(student, teacher, stats, grad, kind)
        over = student.clone()
        address = over.data_ptr()
        torch.ops.pymerge.kl_divergence_backward_(over, teacher, stats, grad, kind)
        assert torch.equal(over, want) and over.data_ptr() == address


def test_strided_logits_and_gradients():
    student, teacher = logits(4, 6, 90)
    cut = student[:, :-1, ::2].requires_grad_()
    loss = OP(cut, teacher[:, 1:, ::2], "forward")
    assert torch.equal(loss, OP(cut.contiguous(), teacher[:, 1:, ::2].contiguous(), "forward"))
    (gradient,) = torch.autograd.grad(loss.t(), cut, torch.ones(5, 4))  # an expanded, transposed gradient
    assert gradient.shape == cut.shape and gradient.isfinite().all()


def test_forward_operator_alone_has_gradients_too():
    student, teacher = logits(3, 10)
    loss, stats = torch.ops.pymerge.kl_divergence_forward(student.requires_grad_(), teacher, "reverse")
    assert not stats.requires_grad
    (got,) = torch.autograd.grad(loss.sum(), student)
    assert torch.equal(got, torch.ops.pymerge.kl_divergence_backward(student, teacher, stats, torch.ones(3), "reverse"))


def test_only_what_is_asked_for_is_differentiated():
    student, teacher = logits(3, 10)
    assert not OP(student, teacher, "forward").requires_grad
    teacher.requires_grad_()
    (gradient,) = torch.autograd.grad(OP(student, teacher, "forward").sum(), teacher)
    assert gradient.shape == teacher.shape


def test_all_rows_masked_is_zero_with_a_graph():
    student, teacher = (x.requires_grad_() for x in logits(3, 10))
    loss = OP(student, teacher, "reverse", 0.5, 1.0, torch.zeros(3, dtype=torch.bool))
    loss.sum().backward()
    assert loss.sum() == 0 and student.grad.count_nonzero() == 0


def test_one_vocabulary_entry_and_no_leading_dimension():
    assert OP(torch.tensor([3.0]), torch.tensor([-4.0]), "jsd").shape == ()
    assert OP(torch.tensor([3.0]), torch.tensor([-4.0]), "jsd") == 0


GOOD = {"student": torch.zeros(2, 5), "teacher": torch.zeros(2, 5), "kind": "jsd", "beta": 0.5, "temperature": 1.0, "mask": None}
BAD = [
    ({"kind": "kl"}, ValueError, "'kl' is no divergence; choose one of 'forward', 'reverse', 'jsd'"),
    ({"teacher": torch.zeros(2, 6)}, ValueError, r"student logits are \(2, 5\), teacher logits \(2, 6\)"),
    ({"student": torch.zeros(2, 0), "teacher": torch.zeros(2, 0)}, ValueError, "the vocabulary is empty"),
    ({"teacher": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "logits of dtype torch.int32"),
    ({"beta": 0.0}, ValueError, "beta is 0.0, not between 0 and 1"),
    ({"beta": float("nan")}, ValueError, "beta is nan"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0, not a positive number"),
    ({"temperature": float("inf")}, ValueError, "temperature is inf"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"the mask is \(5,\), the rows are \(2,\)"),
    ({"mask": torch.ones(2, dtype=torch.int64)}, TypeError, "the mask is torch.int64; give booleans"),
    ({"teacher": torch.zeros(2, 5, device="meta")}, ValueError, "student logits are on cpu, teacher logits on meta"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for _, _, m in BAD])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        OP(**(GOOD | change))


def test_a_backend_that_cannot_is_an_error():
    wide = torch.zeros(2, 5, dtype=torch.float64)
    with pymerge.backend("native"), pytest.raises(ValueError, match="backend 'native' takes fp32, bf16 and fp16 logits"):
        OP(wide, wide, "forward")
