"""A client in a process of its own: asks, and prints what it reads, a JSON object a line.

Usage: ``python client_program.py URL QUESTION [FLAG...]``. The lines: ``{"job_id"}``, then a
``{"text"}`` for each piece of the answer, then ``{"end"}`` with how the job ended.
"""

import argparse
import json
import sys
import time

from mixfleet_broker import terms


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--on-disconnect", choices=("continue", "cancel"), default="continue")
    parser.add_argument("--finish-within-s", type=float)
    parser.add_argument("--reader-s", type=float, default=terms.READER_S)
    parser.add_argument("--clock-skew", type=float, default=0.0)
    given = parser.parse_args()
    vars(terms)["READER_S"] = given.reader_s
    right, right_ns = time.time, time.time_ns
    vars(time)["time"] = lambda: right() + given.clock_skew
    vars(time)["time_ns"] = lambda: right_ns() + round(given.clock_skew * 1e9)

    # Only now: most of the client takes the constant at its import.
    from mixfleet import TokenChunk
    from support.fault_fleet import connect_client

    with connect_client(given.url) as client:
        stream = client.chat(
            given.question,
            max_tokens=given.max_tokens,
            temperature=0.0,
            seed=1,
            on_disconnect=given.on_disconnect,
            finish_within_s=given.finish_within_s,
        )
        say({"job_id": stream.job_id})
        for event in stream.events():
            if isinstance(event, TokenChunk):
                say({"text": event.text})
        assert stream.end is not None
        say({"end": stream.end.state})


def say(line: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
