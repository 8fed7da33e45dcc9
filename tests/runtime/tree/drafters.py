"""Drafters for tests: perfect, always wrong, random, and ones with a given law."""

import torch
from skimp.runtime.tree.node import Children


class Scripted:
    """Knows the text that will follow, or something worse."""

    def __init__(self, texts, kind="perfect", vocabulary=61, width=3, seconds=0.0, chance=0.9):
        self.name, self.texts, self.kind = kind, texts, kind
        self.vocabulary, self.width, self.price, self.chance = vocabulary, width, seconds, chance
        self.generator = torch.Generator().manual_seed(5)
        self.calls = 0

    def begin(self, prompts, hidden):
        self.at = [0] * len(prompts)
        self.rows = list(range(len(prompts)))

    def expand(self, trees, nodes):
        self.calls += 1
        found = []
        for row, node in nodes:
            text = self.texts[self.rows[row]]
            at = self.at[row] + trees[row].depths[node]  # of the node's own token
            following = text[at + 1] if at + 1 < len(text) else 0
            if self.kind == "perfect":
                tokens = [following]
            elif self.kind == "wrong":
                tokens = [(following + 1 + i) % self.vocabulary for i in range(self.width)]
            else:
                order = torch.randperm(self.vocabulary, generator=self.generator)
                tokens = order[: self.width].tolist()
            found.append(Children(tokens, [self.chance / (i + 1) for i in range(len(tokens))]))
        return found

    def commit(self, trees, accepted, hidden):
        for row, path in enumerate(accepted):
            self.at[row] += len(path)
            assert len(hidden[row]) == len(path)

    def drop(self, rows):
        keep = [i for i in range(len(self.rows)) if i not in set(rows)]
        self.at, self.rows = [self.at[i] for i in keep], [self.rows[i] for i in keep]

    def seconds(self, nodes):
        return self.price * nodes


class Given:
    """Prices that tests set: a function of rows, whatever the batch and context."""

    def __init__(self, curve):
        self.curve, self.spent, self.asked = curve, 0.0, []

    def prepare(self, target, lengths):
        pass

    def at(self, batch, context):
        return self

    def __call__(self, rows):
        return self.curve(rows)

    def observe(self, rows, seconds):
        self.asked.append(rows)

    def store(self):
        pass
