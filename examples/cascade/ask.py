"""Ask a cascade through OpenAI's client: which member answered, and what it cost.

Start the members and `skimp serve` as cascade.yaml says. Any program that speaks OpenAI's API
talks to skimp by its address alone.

    python ask.py "What is 12 * 12?" --url http://127.0.0.1:8080/v1
"""

import argparse

import openai


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="skimp", help="a policy, or a member by its name")
    args = parser.parse_args(arguments)
    client = openai.OpenAI(base_url=args.url, api_key="none", max_retries=0)
    asked = dict(model=args.model, messages=[{"role": "user", "content": args.question}])
    answer = client.chat.completions.create(**asked)
    print(answer.choices[0].message.content)
    print(answer.model_extra["skimp"])  # who was asked, who answered, and the price
    for chunk in client.chat.completions.create(**asked, stream=True):  # the same, in parts
        print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="")
    print()


if __name__ == "__main__":
    main()
