"""Small worlds whose optimum is known."""

import re

from skimp.runtime.cascade.responses import Response
from skimp.runtime.cascade.router_world import Question, World, text_of
from skimp.runtime.cascade.traces import MemberSpec

NAMES = ("coder", "mathematician", "writer")
COSTS = {"coder": 1e-4, "mathematician": 2e-4, "writer": 0.5e-4}
TASKS = {
    "program": "simulate the random walk number {} with a program and evaluate the expected value",
    "sum": "add the integers of row {} by hand and report the total",
    "essay": "write a sonnet about lighthouse {} and name its keeper",
}


def questions(n=60, kinds=tuple(TASKS)):
    found = []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        messages = ({"role": "user", "content": TASKS[kind].format(i)},)
        found.append(Question(f"{kind}-{i}", messages, str(1000 + i)))
    return found


def script(member, messages):
    """A program needs the coder, then the mathematician; nobody can do it alone."""
    asked, all_said = messages[0]["content"], text_of(messages[1:])
    i = int(re.search(r"\d+", asked).group())
    kind = next(k for k, t in TASKS.items() if t.split()[0] == asked.split()[0])
    right = f"the answer is {1000 + i}"
    wrong = {
        "coder": "def main(): python code follows, answer 0",
        "mathematician": "by lemma, nothing can be said, answer 1",
        "writer": "roses are red, answer 2",
    }[member]
    solves = {
        "program": member == "mathematician" and "python code" in all_said,
        "sum": member == "mathematician",
        "essay": member == "writer",
    }[kind]
    return [Response(right if solves else wrong, COSTS[member])]


def world(n=60, source=script, members=NAMES, kinds=tuple(TASKS), **more):
    specs = [MemberSpec(m, 1) for m in members]
    return World(questions(n, kinds), specs, source, **more)


def graded(member, messages):
    """Dearer members solve more; nobody's answer depends on what was said before."""
    i = int(re.search(r"\d+", messages[0]["content"]).group())
    kind = next(k for k, t in TASKS.items() if t.split()[0] == messages[0]["content"].split()[0])
    solved = {"coder": ("essay", "sum"), "mathematician": tuple(TASKS), "writer": ("essay",)}
    answer = 1000 + i if kind in solved[member] else 0
    return [Response(f"the answer is {answer}", COSTS[member])]


def capped(n=40):
    """What the first hop costs cannot be read off the question, and decides who comes second."""

    def source(member, messages):
        hidden = messages[0]["content"][1]["seed"]
        if member == "big":
            return [Response("big", 3.0)]
        return [Response("small", 0.5 if hidden % 2 else 2.0)]

    asked = [
        Question(
            str(i),
            (
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "the same question"},
                        {"type": "hidden", "seed": i},
                    ],
                },
            ),
        )
        for i in range(n)
    ]
    specs = [MemberSpec("small", 1), MemberSpec("big", 1)]
    return World(asked, specs, source, quality=lambda q, text: 1.0 if text == "big" else 0.4)
