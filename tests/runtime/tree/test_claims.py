"""What is promised of trees: honest predictions, never slower than plain, batches well filled."""

import pytest
import torch

pytest.importorskip("transformers")

from skimp.ir.cost import Curves, StepCurve
from skimp.runtime.tree.engine import Engine
from skimp.runtime.tree.hf import HFTarget
from skimp.runtime.tree.ngram import NGram
from skimp.runtime.tree.node import Children
from skimp.runtime.tree.policy import CostPolicy, pooled
from skimp.runtime.tree.published import FixedPolicy
from skimp.runtime.tree.report import picture

from .drafters import Given
from .models import llama
from .test_policy import random_draft


class World:
    """Text that follows a drafter's first child so often; time by a curve. No machine is timed."""

    name = "world"

    def __init__(self, curve, *, right, says=None, price=0.0, rows=1):
        self.curve, self.right, self.price, self.rows = curve, right, price, rows
        self.says = right if says is None else says
        self.generator = torch.Generator().manual_seed(0)
        self.spent, self.tokens, self.expected, self.accepted = 0.0, 0, 0.0, 0
        self.verified = []

    def expand(self, trees, nodes):
        self.spent += self.seconds(len(nodes))
        return [Children([1, 2], [self.says, 0.1 * self.says]) for _ in nodes]

    def seconds(self, nodes):
        return self.price * (1 + 0.05 * nodes)

    def run(self, policy, steps):
        policy.begin(self.rows)
        for _ in range(steps):
            before = self.spent
            drafts = policy.draft([0] * self.rows, [100] * self.rows)
            chosen = policy.select(drafts)
            texts = []
            for nodes, draft in zip(chosen, drafts, strict=True):
                self.expected += sum(draft.tree.values[n] for n in nodes) - 1
                text, node = [], 0
                while node in nodes:
                    hit = float(torch.rand((), generator=self.generator)) < self.right
                    text.append(1 if hit else 3)
                    node = draft.tree.children[node].get(text[-1])
                self.accepted += len(text) - 1
                texts.append(text)
            self.spent += self.curve(sum(map(len, chosen)))
            self.tokens += sum(map(len, texts))
            self.verified.append(sum(map(len, chosen)))
            policy.learn(drafts, texts, self.spent - before)

    @property
    def rate(self):
        return self.tokens / self.spent


CURVES = {
    "flat": lambda n: 1.0,
    "linear": lambda n: float(n),
    "cliff at two rows": lambda n: 1.0 if n < 2 else 2.3 + 0.05 * n,
    "steps": lambda n: 1.0 + 0.5 * ((n - 1) // 8),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("rows", [1, 32])
def test_text_that_cannot_be_guessed_is_not_decoded_slower_than_plain(curve, rows):
    """A dear drafter that is never right, and says that it is: 0.97 of plain decoding at least."""
    cost = CURVES[curve]
    world = World(cost, right=0.0, says=0.9, price=0.3, rows=rows)
    world.run(CostPolicy([world], cost), 1200 if rows == 1 else 300)
    assert world.rate >= 0.97 * rows / cost(rows)


@pytest.mark.parametrize("says", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("policy", [CostPolicy, FixedPolicy])
def test_accepted_tokens_are_predicted_within_five_percent(says, policy):
    """Right six times of ten, whatever confidence the drafter has."""
    cost = CURVES["steps"]
    world = World(cost, right=0.6, says=says)
    options = dict(size=6, depth=5, width=1) if policy is FixedPolicy else {}
    chosen = policy([world], cost, **options)
    world.run(chosen, 200)  # it learns
    world.expected = world.accepted = 0
    world.run(chosen, 2500)
    assert world.accepted > 1000
    assert world.expected == pytest.approx(world.accepted, rel=0.05)


def test_a_step_is_predicted_within_ten_percent_though_others_interfere(tmp_path):
    """Steps of known length, a third of them disturbed; then the machine slows down by half."""
    g = torch.Generator().manual_seed(1)

    def taken(rows, slow=1.0):
        noise = float(torch.rand((), generator=g))
        return slow * (0.02 + 0.001 * rows) * (1 + 0.03 * noise + (noise > 0.67) * noise)

    curve = StepCurve(Curves(tmp_path / "curves.json"), "step")
    curve.set({n: taken(n) for n in (1, 2, 4, 8, 16, 32, 64)})
    for slow in (1.0, 1.5):
        off = []
        for i in range(600):
            rows = int(torch.randint(1, 40, (), generator=g))
            if i >= 300:
                off.append(abs(curve(rows) / (slow * (0.02 + 0.001 * rows) * 1.015) - 1))
            curve.observe(rows, taken(rows, slow))
        assert sorted(off)[len(off) // 2] <= 0.10


def test_one_pool_for_a_batch_gains_at_least_what_equal_shares_do():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        drafts = [random_draft(12, g) for _ in range(8)]
        for share in (1, 2, 4):
            together = sum(v for v, _, _ in pooled(drafts, 8 * share))
            apart = sum(v for d in drafts for v, _, _ in pooled([d], share))
            assert together >= apart - 1e-9


def test_the_report_adds_up_and_its_picture_shows_the_accepted_path():
    model = llama()
    drafters = [NGram()]
    prices = Given(lambda n: 0.01 + 1e-5 * n)
    run = Engine(HFTarget(model), drafters, CostPolicy(drafters, prices), prices)
    texts = run.run([[5, 9, 33], [7] * 12], limits=[80, 60])
    report = run.report
    said = report.as_dict()
    assert said["tokens"] == sum(map(len, texts)) == 140
    assert report.seconds == pytest.approx(
        report.first + report.draft + report.verify + report.other
    )
    assert sum(report.sizes.values()) == report.row_steps
    assert report.tokens <= report.row_steps + report.accepted + 2  # some fall behind an end
    for key in ("tokens_per_second", "first", "time_error", "expected", "hardware", "model"):
        assert key in said
    assert "threads" in report.hardware
    example = report.example
    page = picture(example, lambda t: f"<{t}>")
    assert page.count('class="yes" transform') == len(example.accepted)
    assert f"{len(example.accepted) - 1} accepted" in page
    assert "&lt;" in page
    assert "<7>" not in page  # what tokens say is text
