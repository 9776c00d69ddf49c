"""Programs that a model writes: what passes, what the limits stop, and that nothing runs unasked."""

from __future__ import annotations

import json
import socket
import threading
import time
import tracemalloc

import pytest

from corda.data.formats import to_records
from corda.errors import RecipeError
from corda.evaluation import execution
from corda.evaluation.evaluate import load_tasks
from corda.evaluation.execution import pass_at_1, passes
from corda.reading import parse_recipe

TASK = {
    "task_id": "T/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n    assert candidate('a') == 'aa'\n",
}


def test_the_right_solution_passes_and_a_wrong_one_does_not():
    [record] = to_records([TASK])
    assert passes(record.prompt + record.response + record.program)
    assert not passes(record.prompt + "    return x + x + (x == 4)\n" + record.program)
    assert not passes(record.prompt + "    return ]\n" + record.program)


def test_a_program_finds_itself_as_a_module():
    """Dataclasses look the types that they were given as text up in the module of their class."""
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    body = "@dataclass\nclass Point:\n    x: int\n    y: int = 0\n\nassert Point(3).y == 0\n"
    assert passes(head + body)


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('corda-passed')\nraise SystemExit",
        "x = bytearray(3 << 30)",
        "open('big', 'wb').write(b'0' * (2 << 20))",
    ],
    ids=["exit", "hard exit", "claims", "memory", "disk"],
)
def test_ending_early_or_beyond_a_limit_is_no_pass(body):
    assert not passes(body + "\n")


def test_what_a_program_prints_is_not_kept():
    tracemalloc.start()
    assert not passes("while True: print('x' * 1000)\n", seconds=1.0)
    assert passes("print('x' * 10000000)\n")
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


def test_an_endless_program_is_ended_with_its_children():
    start = time.perf_counter()
    assert not passes("import os\nos.fork()\nwhile True: pass\n", seconds=1.0)
    assert time.perf_counter() - start < 10


def test_a_program_sees_neither_environment_nor_packages(monkeypatch):
    monkeypatch.setenv("CORDA_SECRET", "x")
    assert passes("import os\nassert 'CORDA_SECRET' not in os.environ\n")
    assert not passes("import torch\n")


def test_no_network_where_the_kernel_allows_it():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    threading.Thread(target=lambda: server.accept(), daemon=True).start()
    reached = passes(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)\n")
    isolated = passes("import os\nassert not [n for n in os.listdir('/sys/class/net') if n != 'lo']\n")
    if reached and not isolated:
        pytest.skip("this kernel gives ordinary processes no network namespace")
    assert not reached


def test_pass_at_1_runs_prompt_completion_and_test(monkeypatch, model, tokenizer):
    records = to_records([TASK, TASK | {"entry_point": "double", "prompt": "def double(x):\n    # a\n"}])
    answers = iter([["    return 2 * x\n", "    return x\n"]])
    monkeypatch.setattr(execution, "generate", lambda *args, **kwargs: next(answers))
    score, shown = pass_at_1(model, tokenizer, records)
    assert (score.value, score.n) == (0.5, 2)
    assert [answer.right for answer in shown] == [True, False]


def test_nothing_runs_unless_it_is_allowed(raw_recipe, data):
    (data / "code.jsonl").write_text(json.dumps(TASK) + "\n")
    raw_recipe["evaluation"]["tasks"]["code"] = {
        "dataset": "code.jsonl",
        "measures": "keep",
        "metrics": ["answer_loss", "pass_at_1"],
    }
    with pytest.raises(RecipeError, match=r"execute_code: true"):
        load_tasks(parse_recipe(raw_recipe))
    raw_recipe["evaluation"]["execute_code"] = True
    [task] = [task for task in load_tasks(parse_recipe(raw_recipe)) if task.name == "code"]
    assert task.records[0].response == "    return 2 * x\n"


def test_completions_keep_their_indentation(model, tokenizer):
    from corda.evaluation.generation import cut

    assert cut("    return 1\n\ndef more():", execution.STOP, False) == "    return 1\n"
    assert cut("  4\nQuestion", ["\n"], True) == "4"
