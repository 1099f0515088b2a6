"""An unmodified `Trainer` evaluates a model with memory: it finds the labels, and the loss."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import find_labels

from cometlm import CometForCausalLM
from tests.tiny import random_ids, tiny_comet


def test_labels_are_the_only_labels():
    assert find_labels(CometForCausalLM) == ["labels"]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_loss_is_evaluated(tmp_path):
    model = tiny_comet("llama").float().train()
    rows = [{"input_ids": random_ids(40, seed=i), "labels": random_ids(40, seed=i)} for i in (1, 2)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", per_device_eval_batch_size=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        own = [model.eval()(r["input_ids"][None], labels=r["labels"][None]).loss for r in rows]
    assert measured == pytest.approx(float(sum(own) / 2), rel=1e-5)
    logged = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(logged) == 3  # after each of two steps, and now
