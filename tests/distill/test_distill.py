"""One and several teachers, whole and by their top k."""

import math

import pytest
import torch
import torch.nn.functional as F

from pymerge.distill import TeacherEnsemble, TopK, distillation_loss, top_k, topk_divergence
from pymerge.losses import kl_divergence


def logits(*shape, seed=0, dtype=torch.float64):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def test_the_sum_of_both_terms():
    student, teacher = logits(2, 5, 9), logits(2, 5, 9, seed=1)
    labels = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(2))
    labels[1, 3:] = -100
    got = distillation_loss(student, teacher, labels, alpha=0.3, temperature=2.0, scale_by_t2=True)
    entropy = F.cross_entropy(student.view(-1, 9), labels.view(-1))
    distance = kl_divergence(student, teacher, direction="forward", temperature=2.0, scale_by_t2=True, labels=labels)
    torch.testing.assert_close(got, 0.7 * entropy + 0.3 * distance)
    torch.testing.assert_close(distillation_loss(student, teacher, labels, alpha=0.0), entropy)
    torch.testing.assert_close(distillation_loss(student, teacher, alpha=1.0), kl_divergence(student, teacher, direction="forward"))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, labels), student)
    with pytest.raises(ValueError, match="labels"):
        distillation_loss(student, teacher)
    with pytest.raises(ValueError, match="alpha"):
        distillation_loss(student, teacher, labels, alpha=2)


def test_masks_hold_for_both_terms():
    student, teacher = logits(1, 4, 6), logits(1, 4, 6, seed=1)
    labels, mask = torch.tensor([[1, 2, -100, 3]]), torch.tensor([[True, False, True, True]])
    kept = [0, 3]
    want = distillation_loss(student[:, kept], teacher[:, kept], labels[:, kept])
    torch.testing.assert_close(distillation_loss(student, teacher, labels, mask=mask), want)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_ensemble_s_probabilities_and_logits(temperature):
    teachers = [logits(2, 3, 7, seed=s) for s in range(3)]
    weights = [1.0, 2.0, 1.0]
    calls = [lambda i, t=t: t[i] for t in teachers]
    rows = torch.tensor([0, 1])
    mixed = TeacherEnsemble(calls, weights).logits(rows, temperature=temperature).double()
    want = sum(w / 4 * torch.softmax(t / temperature, -1) for w, t in zip(weights, teachers))
    torch.testing.assert_close(torch.softmax(mixed / temperature, -1), want, rtol=1e-5, atol=1e-6)
    product = TeacherEnsemble(calls, weights, mode="logit_mean").logits(rows, temperature=temperature).double()
    torch.testing.assert_close(product, sum(w / 4 * t for w, t in zip(weights, teachers)), rtol=1e-5, atol=1e-6)


def test_routing_runs_each_teacher_on_its_own_sequences():
    seen = {}

    def teacher(number):
        def call(x, extra=None):
            seen[number] = x.tolist()
            return torch.full((len(x), 2), float(number)) + extra[:, None]

        return call

    ensemble = TeacherEnsemble([teacher(i) for i in range(3)], mode="route")
    result = ensemble.logits(torch.arange(4), extra=torch.tensor([0.0, 0.1, 0.2, 0.3]), route=torch.tensor([2, 0, 2, 0]))
    assert seen == {0: [1, 3], 2: [0, 2]}
    torch.testing.assert_close(result[:, 0], torch.tensor([2.0, 0.1, 2.2, 0.3]))
    with pytest.raises(ValueError, match="teacher 5"):
        ensemble.logits(torch.arange(1), extra=torch.zeros(1), route=torch.tensor([5]))
    with pytest.raises(ValueError, match="route="):
        ensemble.logits(torch.arange(1))


@pytest.mark.parametrize("build", [
    lambda: TeacherEnsemble([]), lambda: TeacherEnsemble([print], [0.0]), lambda: TeacherEnsemble([print], [1, 2]),
    lambda: TeacherEnsemble([print], mode="mean"), lambda: TeacherEnsemble([print], [1], mode="route"),
])  # fmt: skip
def test_ensembles_that_make_no_sense(build):
    with pytest.raises(ValueError):
        build()


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_entries_known_is_the_full_divergence(tail, direction):
    student, teacher = logits(3, 8), logits(3, 8, seed=1)
    known = top_k(teacher, 8, temperature=2.0)
    got = topk_divergence(student, known, tail=tail, direction=direction, temperature=2.0)
    torch.testing.assert_close(got, kl_divergence(student, teacher, direction=direction, temperature=2.0), rtol=1e-6, atol=1e-6)


def test_tails_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    known = TopK(torch.tensor([[0, 1]]), p[:2].log()[None])
    student = q.log()[None]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b))

    assert topk_divergence(student, known, tail="renormalize").item() == pytest.approx(kl([5 / 8, 3 / 8], [0.5, 0.5]))
    assert topk_divergence(student, known, tail="bucket").item() == pytest.approx(kl([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    assert topk_divergence(student, known, tail="zero").item() == pytest.approx(kl([5 / 8, 3 / 8], [0.2, 0.2]))
    assert topk_divergence(student, known, tail="bucket", direction="reverse").item() == pytest.approx(kl([0.2, 0.2, 0.6], [0.5, 0.3, 0.2]))


@pytest.mark.parametrize(
    "tail, direction", [(t, d) for t in ("renormalize", "bucket") for d in ("forward", "reverse")] + [("zero", "forward")]
)
def test_topk_gradients(tail, direction):
    student, known = logits(2, 3, 9).requires_grad_(), top_k(logits(2, 3, 9, seed=1), 4)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda s: topk_divergence(s, known, tail=tail, direction=direction, mask=mask), student)


def test_a_certain_teacher_is_finite():
    certain = top_k(torch.tensor([[100.0, 0, 0, 0]]), 1)
    student = torch.tensor([[100.0, 0, 0, 0], [0.0, 0, 0, 0]])[:1].requires_grad_()
    loss = topk_divergence(student, certain, tail="bucket")
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_bf16_students_are_widened_in_pieces(monkeypatch):
    from pymerge.distill import topk

    monkeypatch.setattr(topk, "CHUNK", 40)
    student, known = logits(7, 20, dtype=torch.bfloat16).requires_grad_(), top_k(logits(7, 20, seed=1), 5)
    topk_divergence(student, known, tail="bucket").backward()
    exact = student.detach().double().requires_grad_()
    topk_divergence(exact, known, tail="bucket").backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"tail": "none"}, "tail"), ({"tail": "zero", "direction": "reverse"}, "infinite"), ({"direction": "jsd"}, "direction"),
    ({"logits": torch.zeros(4, 6)}, "not the same tokens"),
])  # fmt: skip
def test_what_does_not_fit_is_said(change, message):
    known = top_k(torch.zeros(3, 6), 2)
    with pytest.raises(ValueError, match=message):
        topk_divergence(**{"logits": torch.zeros(3, 6), "teacher": known, "tail": "bucket", **change})
