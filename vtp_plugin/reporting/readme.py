"""Fill the generated parts of README.md and docs: `python -m vtp_plugin.reporting.readme`. No number typed by hand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vtp_plugin import files
from vtp_plugin.reporting import statistics, summary
from vtp_plugin.reporting.tables import Table

PAGES = (Path("README.md"), Path("docs/studies.md"), Path("docs/embedded-model.md"), Path("docs/fidelity.md"))
SCALE = Path("docs/scale.md")
RESULTS = Path("docs/results")
STUDIES = RESULTS / "studies"
LEADERBOARD = RESULTS / "leaderboard.html"
DEMO, BENCH = RESULTS / "demo" / "summary.json", RESULTS / "bench_cpu.json"
GPU, TRAINING, QWEN = RESULTS / "gpu", RESULTS / "tiny" / "log.json", RESULTS / "qwen" / "log.json"
HEADLINE, LINE = "vtp-0.25", "fastv-0.25"
SALIENT, CONTROL, COUNT = ("atp-0.25", "visionzip-0.25", "l2-0.25"), "random-0.25", "vtp_scenes_count"


def parts() -> dict[str, Callable[[], str]]:
    """The generated blocks by name."""
    from vtp_plugin.bench import gpu_page
    from vtp_plugin.cli.list import families
    from vtp_plugin.tiny import page
    from vtp_plugin.tiny.qwen.train import TRAINS

    return {
        "headline": headline,
        "counting": counting,
        "line": last_line,
        "strategies": lambda: strategies().markdown(),
        "models": lambda: families(vllm=False).markdown(),
        "demo": lambda: demo().markdown(),
        "bench": lambda: bench().markdown(),
        "gpu": lambda: gpu_page.short(GPU),
        "tiny stages": lambda: page.stages(TRAINING).markdown(),
        "tiny accuracy": lambda: page.accuracy(TRAINING).markdown(),
        "qwen stages": lambda: page.stages(QWEN, TRAINS).markdown(),
        "qwen accuracy": lambda: page.accuracy(QWEN).markdown(),
        "qwen catalogue": (RESULTS / "qwen" / "versus-vtp.md").read_text,
        "judged where": lambda: judged_where("judged-where"),
        "judged where, learnt": lambda: judged_where("judged-where-qwen"),
        **{f"study {path.parent.name}": path.read_text for path in sorted(STUDIES.glob("*/table.md"))},
    }


# -- what the demo says -----------------------------------------------------------------------------------------------


def headline() -> str:
    """One configuration of the demo in a sentence."""
    rows = files.read_json(DEMO)["rows"]
    row, unpruned, random = rows[HEADLINE], rows["none"], rows[CONTROL]
    kept, of = row["tokens"]["after"], row["tokens"]["before"]
    return (
        f"**{_percent(row['mean'])} of {_questions(row)} questions right with {kept:.0f} of {of:.0f} visual tokens** "
        f"({row['pruning']}; {_percent(unpruned['mean'])} with all of them, {_percent(random['mean'])} with as many "
        f"random ones), for {row['flops_ratio']:.2f}x of the prefill's FLOPs and {_ttft(row, unpruned)} of the time to "
        "first token. Measured on the embedded model by `make demo`."
    )


def last_line() -> str:
    """What a run of the demo printed in the end."""
    record = files.read_json(DEMO)["rows"][LINE]["record"]
    return f"```\n{summary.line(record['strategies'], record, 'out/')}\n```"


def counting() -> str:
    """How the methods that keep what is salient count, beside random tokens."""
    rows = files.read_json(DEMO)["rows"]
    said = ", ".join(f"{rows[id]['pruning']} {_count(rows[id])}" for id in SALIENT)
    return (
        f"With a quarter of the tokens, methods that rank by salience count worse than random tokens do: {said}, "
        f"random {_count(rows[CONTROL])}, all tokens {_count(rows['none'])} (chance: 25 %)."
    )


def demo() -> Table:
    """The demo in six columns; all of them are in docs/results/demo/table.md."""
    content = files.read_json(DEMO)
    rows = content["rows"]
    table = Table(["method", "tokens", "FLOPs", "TTFT", "accuracy [95 %]", "against random"])
    for row in rows.values():
        over = row["over_at_equal_layers"].get("random")
        table.add(
            row["label"],
            f"{row['tokens']['after']:.0f}/{row['tokens']['before']:.0f}",
            f"{row['flops_ratio']:.2f}x",
            _ttft(row, rows["none"]),
            _accuracy(row),
            "-"
            if over is None
            else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * over[k] for k in ("value", "low", "high"))),
        )
    table.caption = (
        f"{_questions(rows['none'])} questions of {len(rows['none']['tasks'])} kinds. Accuracy: % right, mean over the "
        "kinds. Against random: points above random with as many tokens x layers or the next fewer, paired by "
        f"question; an interval that holds 0 does not show a difference{_beaten(rows)}. Tokens: in the last decoder "
        f"layer; fastv's first two layers see all of them, so it is held against {_spent(rows)}. Positions of kept "
        "tokens: those of the whole prompt, for all. FLOPs: whole prefill, vision tower included. TTFT: median time to "
        "first token. Both: relative to the unpruned model."
    )
    return table


def _spent(rows: Mapping[str, Any]) -> str:
    """The control that has as many tokens x layers as fastv."""
    return next(id for id in rows if id.startswith("random-") and id != CONTROL)


def _beaten(rows: Mapping[str, Any]) -> str:
    """What that says of the methods together, if it is the same of all."""
    held = [row["over_at_equal_layers"]["random"] for row in rows.values() if row["over_at_equal_layers"]]
    return ": no method is shown to beat random here" if all(each["low"] <= 0 for each in held) else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _questions(row: Mapping[str, Any]) -> int:
    return sum(task["questions"] for task in row["tasks"].values())


def _count(row: Mapping[str, Any]) -> str:
    return f"{100 * row['tasks'][COUNT]['accuracy']['value']:.0f} %"


def _ttft(row: Mapping[str, Any], unpruned: Mapping[str, Any]) -> str:
    part, whole = (each["record"]["latency"]["ttft"]["p50"] for each in (row, unpruned))
    return f"{part / whole:.2f}x"


def _accuracy(row: Mapping[str, Any]) -> str:
    """With the interval of the mean; a record without one has the shares of right answers, which give it."""
    ends = row.get("mean_interval")
    if ends is None:
        right = [(round(t["accuracy"]["value"] * t["questions"]), t["questions"]) for t in row["tasks"].values()]
        found = statistics.difference([[1.0] * n + [0.0] * (of - n) for n, of in right])
        ends = {"low": found.low, "high": found.high}
    return f"{100 * row['mean']:.1f} [{100 * ends['low']:.1f}, {100 * ends['high']:.1f}]"


def judged_where(folder: str) -> str:
    """What the study says of judging before a merger: the first sentences below its first table."""
    text = (STUDIES / folder / "table.md").read_text()
    return re.search(r"^Judged before .*?(?= \d+ test (clips|scenes))", text, re.MULTILINE)[0]


# -- what the bench says ----------------------------------------------------------------------------------------------


def bench() -> Table:
    """Time to first token in six columns; all of them are in docs/results/bench_cpu.md."""
    content = files.read_json(BENCH)
    settings = _settings(content["command"])
    table = Table(["method", "tokens", "FLOPs", "TTFT", "KV", "of ideal"])
    for timing in content["timings"]:
        given = ", ".join(f"{key}={value}" for key, value in settings.get(timing["strategy"], {}).items())
        name = f"{timing['strategy']} {timing['keep']:g}" + (f" ({given})" if given else "")
        kv = timing["kv_bytes"]["after"] / timing["kv_bytes"]["before"]
        ratios = [f"{timing[key]:.2f}x" for key in ("flops_ratio", "ttft_ratio")]
        tokens = f"{timing['tokens_after']:.0f}/{timing['tokens_before']}"
        table.add(name, tokens, *ratios, f"{kv:.2f}x", f"{timing['over_ideal']:.2f}x")
    table.caption = (
        f"{content['shape']}, random weights, {content['layers']} decoder layers, {content['device']} with "
        f"{content['threads']} threads. Relative to the unpruned model; of ideal: to it with as many tokens given "
        "by hand."
    )
    return table


def _settings(command: str) -> dict[str, dict[str, str]]:
    """Hyper-parameters that a bench was given beside the budget, by strategy."""
    words = shlex.split(command)
    pairs = words[words.index("--pruning-args") + 1].split(",") if "--pruning-args" in words else []
    found: dict[str, dict[str, str]] = {}
    for pair in pairs:
        (name, _, field), value = pair.partition("=")[0].partition("."), pair.partition("=")[2]
        if field not in ("keep_ratio", "keep_tokens"):
            found.setdefault(name, {})[field] = value
    return found


# -- the catalogue ----------------------------------------------------------------------------------------------------


def strategies() -> Table:
    """Without the hyper-parameters, which `vtp list NAME` has."""
    from vtp_plugin.cli.list import catalogue

    whole = catalogue()
    columns = [number for number, name in enumerate(whole.columns) if not name.startswith("parameters")]
    table = Table([whole.columns[number] for number in columns])
    for row in whole.rows:
        table.add(*(row[number] for number in columns))
    return table


def board() -> str:
    """The page of all committed records."""
    from vtp_plugin.reporting import leaderboard

    return leaderboard.page(leaderboard.entries([RESULTS]), LEADERBOARD)


def filled(text: str) -> str:
    """The text with every block between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in parts().items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = block.sub(lambda match, make=make: f"{match[1]}\n{make().strip()}\n\n{match[2]}", text)
    return text


def on_gpu() -> str:
    """The page of the records that a GPU made."""
    from vtp_plugin.bench import gpu_page

    return gpu_page.page(GPU)


def commanded(text: str) -> str:
    """The text with what its commands answer: a block of `console` is a line with `$ vtp ...`, then the answer.

    A block of `console last` has the last part of the answer, behind an ellipsis.
    """
    block = re.compile(r"(```console( last)?\n\$ vtp ([^\n]*)\n).*?(```)", re.DOTALL)
    return block.sub(lambda found: f"{found[1]}{_answered(found[3], bool(found[2]))}{found[4]}", text)


def _answered(arguments: str, last: bool) -> str:
    """What `vtp` prints for these arguments."""
    from typer.testing import CliRunner

    from vtp_plugin.cli import app, vtp_register_commands

    if not app.registered_commands:
        vtp_register_commands(cli=app)
    done = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, shlex.split(arguments))
    if done.exit_code:
        raise RuntimeError(f"vtp {arguments}: exit code {done.exit_code}: {done.output}")
    output = "...\n" + done.output.strip("\n").split("\n\n")[-1] if last else done.output.strip("\n")
    lines = [line.rstrip() for line in output.splitlines()]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    SCALE.write_text(commanded(SCALE.read_text()))
    LEADERBOARD.write_text(board())
    (GPU / "README.md").write_text(on_gpu())
