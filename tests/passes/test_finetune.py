"""A user's own loss: a classifier converted with it keeps its task better than without."""

import weakref

import pytest
import skimp
import torch
from skimp.ir.errors import CalibrationError
from skimp.passes.base import Context
from skimp.passes.budget import Budget
from skimp.passes.convert import prepare, recipe
from skimp.passes.finetune import Finetune
from skimp.passes.lift import blocks
from skimp.passes.precision import mixed_precision
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")


def sentences(count, seed):
    """Which of two words comes more often in a sentence of fillers; labels separate exactly."""
    g = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(10, 60, (32, 12), generator=g)
        labels = torch.randint(0, 2, (32,), generator=g)
        ids[:, 2], ids[:, 5], ids[:, 9] = 2 + labels, 2 + labels, 3 - labels
        mask = torch.ones_like(ids)
        result.append(dict(input_ids=ids, attention_mask=mask, labels=labels))
    return result


def loss(outputs, batch):
    return F.cross_entropy(outputs.logits, batch["labels"])


@torch.no_grad()
def judged(model, data):
    """Accuracy, and the loss."""
    outputs = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]) for b in data]
    pairs = list(zip(outputs, data, strict=True))
    right = torch.cat([o.logits.argmax(-1) == b["labels"] for o, b in pairs]).float().mean()
    return float(right), sum(float(loss(o, b)) for o, b in pairs) / len(data)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in sentences(150, 1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def converted(model, given, alpha=0.05):
    """Sparsified and routed so briefly and hard that what is left shows which signal helped."""
    steps = [
        Relufy(),
        Sparsify(tokens=600, chunk=300, batch=64, alpha=0.5),
        *([Finetune(steps=60, lr=1e-3, alpha=alpha)] if given else []),
        Split(),
        Route(tokens=600, steps=60),
        Recover(steps=20, share=0.2, lr=1e-3),
        Budget("flops <= 0.6"),
    ]
    return skimp.convert(
        model, sentences(20, 2), passes=steps, loss=given, expert_size=4, router_width=4
    )


@pytest.fixture(scope="module")
def both(classifier):
    return converted(classifier, None), converted(classifier, loss)


def test_with_the_loss_the_task_is_done_at_least_as_well_as_without(classifier, both):
    test = sentences(20, 3)
    dense, without, given = (judged(m, test) for m in (classifier, *(b.model for b in both)))
    assert dense[0] > 0.95
    assert given[0] >= max(without[0], 0.95)
    assert given[1] < without[1]


def test_the_converted_model_does_not_ask_for_labels(both):
    for done in both:
        names = {n.target for n in done.model.graph.nodes if n.op == "placeholder"}
        assert names == {"input_ids", "attention_mask"}


def test_hoyer_makes_zeros_while_the_task_is_learnt(classifier):
    def zeros(alpha):
        done = converted(classifier, loss, alpha)
        found = next(r for r in done.history if r["pass"].startswith("finetune"))["stats"]
        assert found["steps"] == 60
        assert found["loss"] < 0.1
        return found["zeros"]

    assert zeros(1.0) > zeros(0.0) + 0.1


def test_the_recipe_fine_tunes_only_on_a_loss():
    assert not any(isinstance(p, Finetune) for p in recipe())
    order = [p.name for p in recipe(task=True)]
    assert order[:4] == ["relufy", "sparsify", "finetune", "split"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (None, "needs the task's loss"),
        (lambda out, _: out.logits, "a tensor of one number"),
        (lambda out, _: 0.5, "returned float"),
        (lambda out, _: out.logits.detach().sum(), "does not depend"),
        (lambda out, _: out.logits.sum() * float("nan"), "returned nan"),
    ],
)
def test_a_loss_that_cannot_be_learnt_from(classifier, wrong, match):
    data = sentences(2, 4)
    gm, _ = prepare(classifier, data[0], expert_size=4, router_width=4)
    with pytest.raises(CalibrationError, match=match):
        Finetune(steps=1).run(gm, Context(gm, data, data, loss=wrong))
    assert blocks(gm)  # and the blocks are back in their places


def test_training_in_bfloat16_keeps_no_rounded_weights():
    """They would be half of a model, beside the one that is offloaded or computed in segments."""
    rounded = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                rounded.append(weakref.ref(result))
            return result

    layer = torch.nn.Linear(8, 8)
    with mixed_precision(torch.device("cpu"), True), Watch(), torch.no_grad():
        assert layer(torch.ones(2, 8)).dtype == torch.bfloat16
        assert [r() for r in rounded] == [None] * 3  # weight, bias and input
