"""LongProc: traces as published, scores as lm-eval's, the user's copy, the command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ds_longft.cli import main
from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.longproc import scores
from ds_longft.tools.evaluate.longproc.command import LENGTHS, Problem, choose, read_problems
from ds_longft.tools.evaluate.longproc.procedures import countdown, travel
from ds_longft.tools.evaluate.longproc.scores import SCORES, between
from tests.peers import lm_eval_longproc
from tests.unit.tools.evaluate.test_needle import tiny_model

ROWS = 50
CITIES = ("Oslo", "Riga", "Bari", "Gent", "Nice", "Bonn")
NAMES = {"score": "score", "partial": "partial_accuracy", "extracted": "extraction_rate"}


def test_a_search_as_the_benchmark_writes_it() -> None:
    """A row of its countdown_0.5k.json, by hand; then what is rare in one."""
    trace = countdown([31, 23, 22, 36], 40)
    options = "[(31, 23), (31, 22), (31, 36), (23, 22), (23, 36), (22, 36)]"
    assert trace.startswith(
        f"# Search Procedure\nInitial number set: [31, 23, 22, 36], target: 40. Options for choosing two numbers: {options}.\n"
        " |- Pick two numbers (31, 23) (numbers left: [22, 36]). Try possible operations.\n"
        "  |- Try 31 + 23 = 54. Add 54 to the number set. Current number set: [54, 22, 36], target: 40. Options for "
        "choosing two numbers: [(54, 22), (54, 36), (22, 36)].\n"
        "   |- Pick two numbers (54, 22) (numbers left: [36]). Try possible operations.\n"
        "    |- Try 54 + 22 = 76. Add 76 to the number set. Current number set: [76, 36], target: 40, just two numbers left.\n"
        "     |- Try 76 + 36 = 112. Evaluate 112 != 40, drop this branch.\n"
        "     |- Try 76 - 36 = 40. Evaluate 40 == 40, target found!\n\n"
        "Now we have found the target, let's trace back the solution:\nFinal step: 76 - 36 = 40\n"
    )
    assert trace.endswith("<Solution>\n31 + 23 = 54\n54 + 22 = 76\n76 - 36 = 40\n</Solution>\n")
    rare = countdown([40, 40, 50, 50], 1)
    assert "     |- Try 130 / 50 = 2.6. 2.6 is a decimal, drop this branch.\n" in rare
    assert "    |- Try 80 * 50 = 4000. 4000 exceeds the maximum intermediate result, drop this branch.\n" in rare
    assert "     |- Try 80 / 0 (invalid operation). drop this branch.\n" in rare


def test_a_trip_as_the_benchmark_plans_it() -> None:
    """The first of its worked examples: tried in order, dropped for want of a flight, and for a schedule."""
    trace = travel(trip(["Oslo", "Riga", "Bari"], [5, 5, 6], fixed=2))
    assert trace.startswith(
        "<Solving Procedure>\nRead the requirements and identify the cities that have fixed schedules and the cities "
        "that need to be arranged.\n* City: Bari, Duration: 6 days, Fixed Schedule: Day 9 - 14.\n"
        "* City: Riga, Duration: 5 days.\n* City: Oslo, Duration: 5 days.\n\n"
        "Cities that have fixed schedules (sorted by their arrival days):\n* City: Bari, Fixed Schedule: Day 9 - 14.\n\n"
        "Cities needing arrangement:\n* City: Riga, Duration: 5 days.\n* City: Oslo, Duration: 5 days.\n\n"
        "Current day: 1. Current plan: [].\nCheck whether the city with an arrival day of Day 1 - is fixed.\n"
        "No. Consider possible options from cities needing arrangement: [Riga, Oslo] and explore these options in order.\n"
        " |- Try arranging to visit Riga from Day 1. Duration: 5 days. Schedule: Day 1 - 5.\n"
        " |- Check for direct flight from the starting point to Riga.\n |- Yes.\n"
        " |- Check whether this arrangement is compatible with the next fixed schedule after Day 1: Bari (Day 9 - 14).\n"
        " |- The departure day of Riga is Day 5. The arrival day of Bari is Day 9. Day 5 is not later than (<=) Day 9. "
        "This arrangement is compatible.\n"
        " |- This arrangement is feasible for now. Continue to arrange the rest of the plan.\n"
        "  |- Current day: 5. Current plan: [Riga].\n"
    )
    assert (
        "   |- Check for direct flight from Riga to Oslo.\n   |- No. Drop this branch.\n   |- Fail to arrange any"
        in trace
    )
    assert trace.endswith(
        "    |- Yes. The city with an arrival day of Day 9 - is fixed: Bari.\n"
        "     |- Try arranging to visit Bari from Day 9. Duration: 6 days. Schedule: Day 9 - 14.\n"
        "     |- Check for direct flight from Riga to Bari.\n     |- Yes.\n"
        "     |- Check whether this arrangement is compatible with the next fixed schedule after Day 9: None.\n"
        "     |- No following fixed schedules. This arrangement is compatible.\n"
        "     |- This arrangement is feasible for now. Continue to arrange the rest of the plan.\n"
        "      |- Current day: 14. Current plan: [Oslo, Riga, Bari].\n"
        "      |- All 3 cities are arranged. Complete plan is found!\n</Solving Procedure>\n\n"
        "Output the plan in the required format:\n<Plan>\n"
        "**Day 1-5:** Arriving in Oslo and visit Oslo for 5 days.\n**Day 5:** Fly from Oslo to Riga.\n"
        "**Day 5-9:** Visit Riga for 5 days.\n**Day 9:** Fly from Riga to Bari.\n**Day 9-14:** Visit Bari for 6 days.\n</Plan>"
    )
    late = travel(trip(["Oslo", "Riga", "Bari"], [5, 9, 6], fixed=1))
    assert "Day 6 is later than (>) Day 5. This arrangement is incompatible. Drop this branch.\n" in late


def trip(cities: list[str], days: list[int], *, fixed: int) -> dict[str, Any]:
    """A row of travel_planning_all.json: the constraints backwards, flights along the plan."""
    constraints: list[dict[str, Any]] = []
    first = [1 + sum(day - 1 for day in days[:i]) for i in range(len(days))]
    for i in reversed(range(len(cities))):
        constraints.append({"type": "duration", "city": cities[i], "num_days": days[i]})
        if i == fixed:
            dates = {"start_day": first[i], "end_day": first[i] + days[i] - 1}
            constraints.append({"type": "fixed", "city": cities[i], **dates})
    return {
        "num_cities": len(cities), "constraints": constraints, "estimated_output_tokens": 900,
        "connected_cities": [list(pair) for pair in pairwise(cities)],
        "disambig_question_text": f"A trip to {', '.join(sorted(cities))}.",
        "ground_truth_cities": "**".join(cities), "ground_truth_durations": "**".join(map(str, days)),
    }  # fmt: skip


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's folders, with 50 rows of each task and rows as it has them."""
    folder, rng = tmp_path_factory.mktemp("longproc"), random.Random(0)

    def made(task: str, size: str, one: Callable[[int], dict[str, Any]], prompt: str) -> None:
        (folder / task / "webpage").mkdir(parents=True, exist_ok=True)
        name = "travel_planning_all" if task == "travel_planning" else f"{task}_{size}"
        (folder / task / f"{name}.json").write_text(json.dumps([one(i) for i in range(ROWS)]))
        (folder / task / "prompts.yaml").write_text("USER_PROMPT: |-\n  " + prompt.replace("\n", "\n  "))

    def numbers(_: int) -> dict[str, Any]:
        nums = [rng.randrange(1, 50) for _ in range(4)]
        return {"nums": nums, "target": sum(nums)}

    def route(i: int) -> dict[str, Any]:
        steps = [f"From {a}{i}, take a {rng.choice(['bus', 'plane'])} to {b}{i}." for a, b in pairwise(CITIES)]
        return {
            "context_nl": " ".join(reversed(steps)),
            "question_repr": [f"Oslo{i}", f"Bonn{i}"],
            "answer_nl": "\n".join(steps),
        }

    def beliefs(i: int) -> dict[str, Any]:
        steps = [f"- Step {k}: (initial state) {{Ann location: {rng.choice(CITIES)}; pen {i}: None}}" for k in range(8)]
        return {
            "story": f"Step 0: {i}",
            "question": "Where?",
            "solution": "Ann's belief:\n" + "\n".join(steps) + "\nFinal Answer: x",
        }

    def page(i: int) -> dict[str, Any]:
        (folder / "html_to_tsv" / "webpage" / f"W{i}.html").write_text(f"<p>{i}</p>")
        rows = [f"The {rng.choice(CITIES)} No. {k}\tN/A\t{rng.randrange(99)},5" for k in range(6)]
        return {"html_path": f"./data/html_to_tsv/webpage/W{i}.html", "gt": "\n".join(["name\tnote\tprice", *rows]) + "\n",
                "task_topic": "prices"}  # fmt: skip

    def program(i: int) -> dict[str, Any]:
        code = ["int main(){", f"int a; cin >> a; cout << a + {i} << endl;", "}"]
        return {
            "pseudocode_lines": ["read a", f"print a plus {i}"],
            "code_lines": code,
            "testcases": [[["1"], [str(1 + i)]]],
        }

    def plan(_: int) -> dict[str, Any]:
        return trip(rng.sample(CITIES, 4), [rng.randrange(2, 7) for _ in range(4)], fixed=rng.randrange(5))

    made("countdown", "0.5k", numbers, "Shown:\n{demonstration}\nNumbers: {nums}\nTarget: {target}")
    made("path_traversal", "0.5k", route, "{city_context}\nFrom {src_city} to {dst_city}")
    made("tom_tracking", "0.5k", beliefs, "Like {{this}}: {story}\n{question}")
    made("html_to_tsv", "0.5k", page, "{task_topic}: {html_str}")
    made("pseudo_to_code", "0.5k", program, "Write:\n{pseudocode}")
    made("travel_planning", "2k", plan, "Shown:\n{demonstration}\n{problem}")
    examples = [trip(["Oslo", "Riga", "Bari"], [5, 5, 6], fixed=2)]
    (folder / "travel_planning" / "travel_planning_icl_examples.json").write_text(json.dumps(examples))
    return folder


def replies(task: str, problem: Problem, rng: random.Random) -> list[str]:
    """Right, cut in the middle, wrong, and odd."""
    right = problem.reference
    if task == "path_traversal":
        right = f"Let me see.\n<Route>\n{right}\n</Route>"
    elif task in ("html_to_tsv", "pseudo_to_code"):
        right = f"Here:\n```{'tsv' if task == 'html_to_tsv' else 'c++'}\n{right}\n```"
    lines = right.split("\n")
    at = rng.randrange(3, len(lines) - 2)
    changed = [*lines[:at], rng.choice(lines[2:-1]) + rng.choice("ab "), *lines[at + 1 :]]
    dropped, digits = lines[:at] + lines[at + 1 :], right.translate(str.maketrans("34", "43"))
    shuffled = [*lines[:2], *rng.sample(lines[2:-1], len(lines) - 3), lines[-1]]
    made = [right, "\n".join(changed), "\n".join(shuffled), digits, "", "I cannot.", "\n".join(dropped)]
    made += [right.replace("The", "a "), right.replace("\t", "\t\t")]
    if task != "tom_tracking":  # lm-eval reads every trace of a reply, its authors now the last
        made += [right.upper(), right + "\n" + right]
    return made if task == "path_traversal" else [*made, "\n".join(lines[:at])]


@pytest.mark.parametrize("task", LENGTHS)
def test_scores_are_lm_evals(task: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 rows, and replies that are right, half right, wrong and odd. The reference itself is right."""
    theirs_of = lm_eval_longproc()
    judge = getattr(theirs_of, f"process_results_{task}")
    monkeypatch.setattr(scores, "runs", lambda code, cases: f"a + {int(cases[0][1][0]) - 1} <<" in code)
    monkeypatch.setattr(theirs_of, "_evaluate_spoc_code", lambda *asked: (scores.runs(*asked), ""))
    problems = read_problems(str(copy), task, "2k" if task == "travel_planning" else "0.5k", None)
    names = NAMES | ({"partial": "recall", "precision": "precision"} if task == "html_to_tsv" else {})
    rng, seen = random.Random(1), set()
    assert len(problems) == ROWS
    for number, problem in enumerate(problems):
        doc = {"reference_output": problem.reference, "metadata_parsed": problem.row}
        made = replies(task, problem, rng)
        if task == "html_to_tsv":  # data frames are slow: one of the replies to each row
            made = [made[number % len(made)]]
        for reply in made:
            ours, theirs = SCORES[task](reply, problem.reference, problem.row), judge(doc, [reply])
            assert ours == pytest.approx({name: theirs[of] for name, of in names.items()}), reply
            assert reply != made[0] or len(made) == 1 or ours["score"] == 1.0
            seen.add(round(ours["partial"], 2))
    assert len(seen) > (1 if task == "pseudo_to_code" else 3)


def test_a_route_that_ends_too_early_is_counted_as_published() -> None:
    """lm-eval counts one step more."""
    wanted = "a\nb\nc\nd"
    judged = [
        SCORES["path_traversal"](f"<Route>{said}</Route>", wanted, {})["partial"] for said in ("a\nb", "a\nx", "a")
    ]
    assert judged == [0.5, 0.5, 0.25]
    assert between("<Route>a", "Route") is None


@pytest.mark.parametrize(
    ("solution", "right"),
    [
        ("4 + 3 = 7\n7 * 2 = 14\n14 - 1 = 13", True),
        ("4+3=7\n7*2=14\n14-1=13", True),
        ("3 - 4 = -1\n-1 + 2 = 1\n1 + 1 = 2", False),  # not the target
        ("4 + 3 = 8\n8 * 2 = 16\n16 - 1 = 15", False),
        ("4 + 4 = 8\n8 * 2 = 16\n16 - 3 = 13", False),  # 4 twice
        ("4 + 3 = 7\n7 * 2 = 14", False),
        ("4 / 0 = 7\n7 * 2 = 14\n14 - 1 = 13", False),
        ("__import__('os').abort() = 7\n7 * 2 = 14\n14 - 1 = 13", False),
        ("4 + 3 + 2 = 9\n9 * 1 = 9\n14 - 1 = 13", False),
    ],
)
def test_equations(solution: str, right: bool) -> None:
    row = {"nums": [4, 3, 2, 1], "target": 13}
    assert SCORES["countdown"](f"<Solution>\n{solution}\n</Solution>", "# Search Procedure\n", row)["score"] == right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("int main(){ int a; cin >> a; cout << a << endl; }", True),
        ("int main(){ cout << 1; }", False),  # without the end of the line
        ("int main(){ for(;;); }", False),
        ("int main(", False),
    ],
)
def test_programs_run_as_lm_eval_runs_them(code: str, right: bool) -> None:
    cases = [[["1"], ["1"]], [["-7"], ["-7"]]]
    assert scores.runs(code, cases) == lm_eval_longproc()._evaluate_spoc_code(code, cases)[0] == right


def test_prompts_are_filled(copy: Path) -> None:
    (first, *_) = read_problems(str(copy), "countdown", "0.5k", 1)
    assert first.prompt.startswith("Shown:\n# Example\nNumbers: [40, 19, 23, 7]\nTarget: 29\n\n# Search Procedure\n")
    assert first.prompt.count("# Example") == 2
    assert first.prompt.endswith(f"Numbers: {first.row['nums']}\nTarget: {first.row['target']}")
    assert read_problems(str(copy), "tom_tracking", "0.5k", 1)[0].prompt == "Like {this}: Step 0: 0\nWhere?"
    assert read_problems(str(copy), "html_to_tsv", "0.5k", 2)[1].prompt == "prices: <p>1</p>"
    assert read_problems(str(copy), "travel_planning", "8k", None) == [], "by the length of the answer"
    with pytest.raises(DataError, match=r"countdown_8k\.json: No such file"):
        read_problems(str(copy), "countdown", "8k", 1)


def test_which_tasks() -> None:
    assert choose("all", "2k", run_code=False) == [(t, "2k") for t in LENGTHS if t != "pseudo_to_code"]
    assert choose("pseudo_to_code,countdown", "8k,0.5k", run_code=True) == [
        ("countdown", "0.5k"), ("countdown", "8k"), ("pseudo_to_code", "0.5k"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="allow it with --run_code"):
        choose("pseudo_to_code", "2k", run_code=False)
    with pytest.raises(ConfigError, match="--lengths is '4k'"):
        choose("all", "4k", run_code=False)


def test_the_command(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_longft.tools.evaluate.longproc.command.SIZES", {"0.5k": 8, "2k": 8})
    argv = ["eval", "longproc", str(tiny_model(tmp_path / "model")), str(copy), "--lengths", "0.5k", "--limit", "2"]
    argv += ["--tasks", "path_traversal,tom_tracking", "--out", str(tmp_path / "eval")]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scores"] == {"path_traversal 0.5k": 0.0, "tom_tracking 0.5k": 0.0}
    assert result["averages"] == {"answers of 0.5k": 0.0}
    assert result["rows_made_now"] == 4
    assert main(argv) == 0
    assert "mean, answers of 0.5k" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "longproc.json").read_text())["rows_made_now"] == 0
    every = [*argv[:4], "--run_code", "--limit", "1", "--json"]
    for size, tasks in {
        "0.5k": [task for task in LENGTHS if task != "travel_planning"],
        "2k": ["travel_planning"],
    }.items():
        assert main([*every, "--lengths", size, "--tasks", ",".join(tasks), "--out", str(tmp_path / size)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["scores"] == {f"{task} {size}": 0.0 for task in sorted(tasks)}, "each task asked, and judged"
    argv[3] = str(tmp_path)
    assert main(argv) == 64
    assert "expected LongProc's data folder" in capsys.readouterr().err
