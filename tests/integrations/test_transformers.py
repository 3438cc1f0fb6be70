"""A real Trainer on a tiny model."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pymerge import EMA  # noqa: E402
from pymerge.integrations.transformers import EMACallback, ReferenceSyncCallback  # noqa: E402


def tiny(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config)


DATA = [{"input_ids": torch.arange(i, i + 6) % 17, "labels": torch.arange(i, i + 6) % 17} for i in range(24)]


def trainer(folder, model, callbacks, **settings):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, learning_rate=0.05, report_to=[], use_cpu=True, logging_strategy="no",
        seed=1, **settings,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=callbacks)


def test_average_of_the_steps_evaluation_with_it_and_resuming(tmp_path):
    model = tiny()
    seen = []

    class Peek(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen.append({k: v.clone() for k, v in model.state_dict().items()})

    expected = EMA(model, 0.5)

    class Follow(transformers.TrainerCallback):
        """In front of the callback under test: sees the training's own weights."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            expected.update(model)
            if state.global_step == 3:
                self.at_three = {k: v.clone() for k, v in expected.state_dict()["tensors"].items()}

    follow, average = Follow(), EMACallback(0.5)
    run = trainer(tmp_path, model, [follow, Peek(), average], eval_strategy="steps", eval_steps=3, save_steps=3)
    run.train()
    for name, t in expected.state_dict()["tensors"].items():
        assert torch.equal(t, average.ema.state_dict()["tensors"][name])
        assert torch.equal(seen[0][name], follow.at_three[name])  # the evaluation saw the average
        assert torch.equal(run.model.state_dict()[name], model.state_dict()[name])
    final = {k: v.clone() for k, v in model.state_dict().items()}
    assert any(not torch.equal(final[k], seen[1][k]) for k in final)  # training went on with its own weights

    resumed = EMACallback(0.5)
    trainer(tmp_path, tiny(), [resumed], save_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, t in average.ema.state_dict()["tensors"].items():
        torch.testing.assert_close(t, resumed.ema.state_dict()["tensors"][name])
    assert resumed.ema.step == 6

    (tmp_path / "checkpoint-3" / "pymerge_ema.pt").unlink()
    with pytest.raises(ValueError, match="pymerge_ema.pt does not exist"):
        trainer(tmp_path, tiny(), [EMACallback(0.5)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_reference_follows(tmp_path):
    model, reference = tiny(), tiny().requires_grad_(False)
    trainer(tmp_path, model, [ReferenceSyncCallback(reference, decay=0.0, every=3)], save_strategy="no").train()
    for a, b in zip(model.parameters(), reference.parameters()):
        assert torch.equal(a, b)  # six steps, the last move at the sixth
    for bad in ({"decay": 2.0, "every": 1}, {"decay": 0.5, "every": 0}):
        with pytest.raises(ValueError):
            ReferenceSyncCallback(reference, **bad)
