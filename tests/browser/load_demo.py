"""Many users at once: nobody gets another's picture, a full queue says so, memory stays flat.

    python tests/browser/load_demo.py --users 32 --seconds 300

starts `dittune demo` and sends requests through gradio_client, each user in a session of its own.
Every picture is compared, pixel for pixel, with one that this process makes alone.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from statistics import median

import numpy as np
import psutil
from gradio_client import Client
from gradio_client.utils import QueueError
from PIL import Image

import dittune
from dittune.pipelines.demo.controls import defaults
from dittune.pipelines.pipeline import Pipeline

MODEL, STEPS, GUIDANCE = "shapes-sd3", 6, 3.5
PROMPTS = ("a red circle", "a blue square and a green ring", "three yellow triangles")
METHODS = ("none", "softpag", "attention_regulation", "regions")
ENTRY = "/generate"
FIRST = 8  # parameters of the endpoint before those that stay as they are


def references(count):
    """Requests, and what each gives alone: (prompt, seed, method, picture)."""
    pipeline, made = Pipeline.from_pretrained(MODEL), []
    for i in range(count):
        prompt, method = PROMPTS[i % len(PROMPTS)], METHODS[i % len(METHODS)]
        own = [] if method == "none" else [dittune.load_method(method)(**defaults(MODEL, method))]
        pipeline.methods = own
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        image = pipeline(prompt, seed=i, progress=False, **settings).images[0]
        made.append((prompt, i, method, np.asarray(image.convert("RGB"))))
    return made


class User(threading.Thread):
    """One session: asks, compares, waits a little, until the time is over."""

    def __init__(self, url, wanted, until, folder, counts, seconds):
        super().__init__(daemon=True)
        self.client = Client(url, verbose=False, download_files=folder)
        info = self.client.view_api(print_info=False, return_format="dict")
        given = info["named_endpoints"][ENTRY]["parameters"][FIRST:]
        self.rest = [parameter.get("parameter_default") for parameter in given]
        self.wanted, self.until, self.counts, self.seconds = wanted, until, counts, seconds

    def run(self):
        while time.monotonic() < self.until:
            started = time.monotonic()
            prompt, seed, method, picture = random.choice(self.wanted)
            request = (MODEL, prompt, seed, method, "", STEPS, GUIDANCE, "", *self.rest)
            try:
                result = self.client.predict(*request, api_name=ENTRY)
            except QueueError as refused:
                self.counts["refused: " + str(refused)] += 1
                time.sleep(random.uniform(1, 3))
                continue
            except Exception as error:
                self.counts[f"error: {type(error).__name__}: {error}"[:120]] += 1
                continue
            with Image.open(result[2]["value"]) as image:
                same = np.array_equal(np.asarray(image.convert("RGB")), picture)
            self.counts["equal" if same else "DIFFERENT"] += 1
            self.seconds.append(time.monotonic() - started)


@contextlib.contextmanager
def server(port, waiting):
    """`dittune demo` in a process of its own; its process and address."""
    command = [sys.executable, "-m", "dittune.pipelines.cli", "demo", "--port", str(port)]
    started = subprocess.Popen(
        [*command, "--queue", str(waiting)], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in started.stdout:
            if line.startswith("http"):
                yield psutil.Process(started.pid), line.split()[0]
                return
        raise SystemExit("the server has stopped")
    finally:
        started.terminate()
        started.wait(30)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--waiting", type=int, default=24, help="bound of the queue")
    parser.add_argument("--port", type=int, default=7871)
    asked = parser.parse_args()
    counts, seconds, memory = Counter(), [], []
    with tempfile.TemporaryDirectory() as folder, server(asked.port, asked.waiting) as (own, url):
        wanted = references(4)
        print("server and references are ready", flush=True)
        warm = User(url, wanted, time.monotonic() + 5, folder, counts, seconds)
        warm.run()
        counts.clear(), seconds.clear()
        users = [User(url, wanted, 0.0, folder, counts, seconds) for _ in range(asked.users)]
        print("users are connected", flush=True)
        until = time.monotonic() + asked.seconds
        for user in users:
            user.until = until
            user.start()
        while time.monotonic() < until:
            memory.append(own.memory_info().rss / 2**20)
            time.sleep(2)
        for user in users:
            user.join(120)
    print(f"{asked.users} users, {asked.seconds:.0f} s, at most {asked.waiting} waiting")
    for what, count in counts.most_common():
        print(f"{count:6} {what}")
    if seconds:
        print(f"seconds a picture: median {median(seconds):.1f}, longest {max(seconds):.1f}")
    fifth = max(1, len(memory) // 5)
    parts = [f"{median(memory[i * fifth : (i + 1) * fifth]):.0f}" for i in range(5)]
    print(f"memory of the server in MiB, each fifth of the time: {' '.join(parts)}")
    bad = counts["DIFFERENT"] + sum(n for what, n in counts.items() if what.startswith("error"))
    sys.exit(1 if bad or not counts["equal"] else 0)


if __name__ == "__main__":
    main()
