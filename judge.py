"""Judge: ask a model a whole bench, and say how good its answers are.

    python judge.py --weights weights/tiny --bench data/toy/bench.jsonl
    python judge.py --weights runs/mine --bench data/toy/bench-dev.jsonl --out reports --name mine
    python judge.py --weights weights/tiny --bench data/toy/bench.jsonl --text-only --permute
    python judge.py --weights weights/tiny --bench data/toy/bench.jsonl --view concat

Nothing is guessed: an answer that commits to nothing is unparsed, an item that could not be asked
is missing, both score 0 and both are counted. Beside each score stand what a uniform guess would
get (chance) and what the best answer that never listens would (majority); on demand, what the model
itself says without the clips (text-only), and how often it says something else when they come in
another order (flips). DIR/NAME.json holds it all, item by item.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others

import kernels  # noqa: E402
from model import add_weight_flags, answer_all, load_net  # noqa: E402
from prepare import (  # noqa: E402
    ONE_ROW_VIEWS, VIEWS, BadInput, Parser, chance, clean, cli, conversation, expect, load_clip,
    parse, progress, read_rows, reordered, score, terms, view_permute, warn, write_json,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Answers.

NEW = 256  # tokens of an answer, at most


def answers(net, rows, root):
    """(number of a row, its answer), in order, of those that can be asked."""
    for i, answer in answer_all(net, asked(rows, root), max_new_tokens=NEW):
        if isinstance(answer, BadInput):
            warn(f"{rows[i]['id']}: {answer}")
        else:
            yield i, answer


def said_by(net, rows, root, label) -> list[str | None]:
    """The answer to each row, None where it could not be asked."""
    show, said = progress(label, len(rows), unit="items", scale=1), [None] * len(rows)
    for i, answer in answers(net, rows, root):
        said[i] = answer
        show(1)
    return said


def asked(rows, root):
    """What is asked, and the clips. Nobody is asked about fewer clips than there are."""
    for i, row in enumerate(rows):
        try:
            yield i, conversation(row)[:-1], [load_clip(clip, root) for clip in row["clips"]]
        except BadInput as mistake:
            warn(f"{row['id']}: {mistake}")


def flips(row, answer, moved, again) -> bool | None:
    """Whether the answer to the reordered row commits to something else. What was answered before
    is put into the new order first."""
    if answer is None or again is None:
        return None
    before = view_permute({**row, "answer": answer}, moved["order"])["answer"]
    if row["gold"]["type"] == "text":  # the same things may be told in another order
        return parts_of(before) != parts_of(again)
    return parse(moved["gold"], before) != parse(moved["gold"], again)


def parts_of(answer) -> list[str]:
    told = re.split(r"(?i)\banswer(?: is)?:", answer)[-1]
    return sorted(" ".join(terms(part)) for part in re.split(r"[;,.\n]", told))


# ------------------------------------------------------------------------------------------------
# The tally.

CONSTANTS = 20  # of the commonest verdicts, how many are tried as the answer to everything


def tally(answered) -> dict:
    """The report on (row, answer or None) pairs. macro is the mean over the tasks, weighted over
    their items; tasks on single clips stand apart."""
    items = [judged(row, answer) for row, answer in answered]
    report = {"macro": 0.0, "weighted": 0.0, "single": {}, "tasks": {}, "items": items}
    rows = [row for row, _ in answered]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [(row, item) for row, item in zip(rows, items) if row["task"] == task]
        single = mine[0][0]["skill"] == "single"
        report["single" if single else "tasks"][task] = summary(mine)
    found = report["tasks"].values()
    asked = sum(task["n"] for task in found)
    report["macro"] = sum(task["score"] for task in found) / max(1, len(found))
    report["weighted"] = sum(task["score"] * task["n"] for task in found) / max(1, asked)
    return report


def judged(row, answer) -> dict:
    """One item of the report: its score is None where the answer was missing or unparsed."""
    right = None if answer is None else score(row["gold"], answer)
    about = {name: row[name] for name in ("id", "task", "skill", "question", "gold")}
    return {**about, "answer": answer, "score": right}


def add_column(report, name, values):
    """A further number of each item, None where it has none: of a task and of all, the mean."""
    for item, value in zip(report["items"], values):
        item[name] = value
    for task, found in (report["tasks"] | report["single"]).items():
        known = [item[name] for item in report["items"] if item["task"] == task]
        known = [value for value in known if value is not None]
        found[name] = sum(known) / len(known) if known else None
    known = [found[name] for found in report["tasks"].values() if found[name] is not None]
    report[name] = sum(known) / max(1, len(known))


def summary(pairs) -> dict:
    """Of one task's rows and items."""
    rows, items = zip(*pairs)
    n = len(items)
    missing = sum(item["answer"] is None for item in items)
    return {
        "n": n,
        "missing": missing,
        "unparsed": sum(item["score"] is None for item in items) - missing,
        "score": sum(item["score"] or 0 for item in items) / n,
        "chance": sum(chance(row) for row in rows) / n,
        "majority": majority(rows),
    }


def majority(rows) -> float:
    """The mean score of the best answer that is the same for all: one of the commonest verdicts."""
    verdicts = Counter(row["meta"].get("verdict", row["answer"]) for row in rows)
    constants = [verdict for verdict, _ in verdicts.most_common(CONSTANTS)]
    scores = (sum(score(row["gold"], told) or 0 for row in rows) for told in constants)
    return max(scores) / len(rows)


def table(report) -> list[str]:
    """The report as lines, one a task."""
    counts, shares = ("n", "missing", "unparsed"), ["score", "chance", "majority"]
    shares += [name for name in ("text-only", "flips") if name in report]
    lines = [f"{'':<16}" + "".join(f"{name:>10}" for name in (*counts, *shares))]
    for task, found in (*report["tasks"].items(), *report["single"].items()):
        cells = [f"{found[name]:>10}" for name in counts]
        known = ["" if found[name] is None else f"{found[name]:.3f}" for name in shares]
        lines.append(f"{task:<16}" + "".join([*cells, *(f"{cell:>10}" for cell in known)]))
    beside = "".join(f"   {name} {report[name]:.3f}" for name in shares[3:])
    return [*lines, f"macro {report['macro']:.3f}   weighted {report['weighted']:.3f}{beside}"]


def main():
    parser = Parser(description="Ask a model a whole bench, and say how good its answers are.")
    parser.add_argument("--weights", required=True, metavar="DIR", help="a checkpoint or a run")
    parser.add_argument("--bench", required=True, metavar="FILE", help="bench.jsonl")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR")
    parser.add_argument("--name", metavar="NAME", help="of the report, default: the weights'")
    parser.add_argument("--items", type=int, metavar="N", help="only the first N")
    parser.add_argument(
        "--view", choices=ONE_ROW_VIEWS, help="another form of every item, see prepare.py"
    )
    parser.add_argument("--text-only", action="store_true", help="ask without the clips, too")
    parser.add_argument(
        "--permute", action="store_true", help="ask with the clips in another order, too"
    )
    add_weight_flags(parser)
    args = parser.parse_args()
    expect(args.items is None or args.items > 0, "--items", "1 or more", args.items)
    bad = []
    rows = [row for row in read_rows(args.bench, bad.append) if "gold" in row][: args.items]
    for mistake in bad:
        warn(f"left out: {mistake}")
    expect(rows, args.bench, "rows with a gold", "none")
    name = args.name or Path(args.weights).resolve().name
    expect(Path(name).name == name, "--name", "a name without folders", repr(name))
    net = load_net(args)
    print(f"{net.device}, {kernels.chosen()} kernels, {net.dtype}", file=sys.stderr)
    root = Path(args.bench).parent
    view = VIEWS[args.view] if args.view else lambda row: row
    said = said_by(net, list(map(view, rows)), root, "judged")
    report = tally(list(zip(rows, said)))
    if args.text_only:
        deaf = said_by(net, [VIEWS["text-only"](row) for row in rows], root, "without the clips")
        right = [answer and score(row["gold"], answer) for row, answer in zip(rows, deaf)]
        add_column(report, "text-only", [value or 0.0 for value in right])
    if args.permute:
        several = [i for i, row in enumerate(rows) if len(row["clips"]) > 1]
        moved = [reordered(rows[i]) for i in several]
        again = said_by(net, list(map(view, moved)), root, "in another order")
        found = [None] * len(rows)
        for i, row, answer in zip(several, moved, again):
            found[i] = flips(rows[i], said[i], row, answer)
        add_column(report, "flips", found)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{name}.json", {"weights": str(args.weights), "bench": str(args.bench),
                                           "refused": len(bad), **report})  # fmt: skip
    for line in table(report):
        print(clean(line))


if __name__ == "__main__":
    cli(main)
