"""The command line. Importing this module, and ``--help``, load neither torch nor ray, mlflow or optuna.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 nothing found or something
required is missing, 2 an error that the user can mend, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from autocomp.errors import AutocompError, JobError
from autocomp.leave import leave

if TYPE_CHECKING:
    from collections.abc import Callable

    from autocomp.pareto import ParetoFront
    from autocomp.study import Event, StudyResult
    from autocomp.trial import Trial

INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns our errors into one message and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AutocompError as error:
            if os.environ.get("AUTOCOMP_DEBUG", "") not in ("", "0"):
                traceback.print_exc()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    help="Search for the best way to compress your generative model for your hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job in YAML.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o", "--override", metavar="KEY=VALUE", help="Set a dotted key of the job; may be repeated."
    ),
]
Select = Annotated[str, typer.Option("--select", help="Bounds and one goal: 'kl <= 0.1, min decode_ms'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and the result only.")]


def _version(wanted: bool) -> None:
    if wanted:
        from autocomp import __version__

        typer.echo(f"autocomp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    set_up_logging()


@app.command()
def search(
    job: JobFile,
    override: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where to keep the run; default: below the job's output.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run a search and print its front."""
    from autocomp import api
    from autocomp.job import Job

    checked = Job.from_yaml(job, override or ())
    folder = run_dir if run_dir is not None else api.new_run_dir(checked)
    _run(folder, quiet, lambda on_event: api.search(checked, run_dir=folder, on_event=on_event))


@app.command()
def resume(run_dir: RunDir, override: Overrides = None, quiet: Quiet = False) -> None:
    """Continue a run; nothing is measured twice. -o may change budget, executor and tracking."""
    from autocomp import api

    _run(
        run_dir,
        quiet,
        lambda on_event: api.resume(run_dir, overrides=override or (), on_event=on_event),
    )


@app.command()
def front(
    run_dir: RunDir,
    select: Select = "",
    html: Annotated[Path | None, typer.Option(help="Write an interactive page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
    choices: Annotated[
        Path | None, typer.Option("--map", help="Write pictures of what --select chose for each layer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the front of a run, finished or not."""
    from autocomp import api

    if choices is not None and not select:
        raise JobError("--map draws one candidate; say which with --select 'kl <= 0.1, min decode_ms'")
    found = api.front_of(run_dir)
    selected = found.select(select) if select else None
    if as_json:
        typer.echo(json.dumps(_front_json(found, selected), indent=2))
    else:
        _print_front(found, selected)
    _draw(run_dir, found, selected, html, png, choices)


@app.command()
def record(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs of one model, space and machine.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, like table.json.gz.")],
    corrected: Annotated[
        bool,
        typer.Option(
            "--corrected", help="Latencies corrected for drift of the device; default: as measured."
        ),
    ] = False,
) -> None:
    """Write what runs measured to one small file, which a search can replay in seconds."""
    from autocomp.recorded import Recording

    recording = Recording.of_runs(run_dirs, corrected=corrected)
    recording.save(out)
    counts = Counter(t.fidelity.name if t.fidelity.split else "timed only" for t in recording.trials.values())
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    typer.echo(f"wrote {out}: {len(recording.trials)} trials ({parts}), {out.stat().st_size / 1e3:.0f} kB")
    typer.echo(
        f"replay it with: autocomp search JOB -o executor.name=simulated -o executor.table={out}", err=True
    )


@app.command()
def measure(
    job: JobFile,
    candidate: Annotated[
        Path, typer.Option(help="JSON or YAML: decision names and options, or {'*': option}.")
    ],
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure one candidate here, on the report split."""
    from autocomp import api, report
    from autocomp.job import Job

    values = _read_candidate(candidate)
    trial = api.measure(Job.from_yaml(job, override or ()), values)
    if as_json:
        typer.echo(json.dumps(trial.to_json(), indent=2))
    elif trial.measurement is None:
        reason = trial.failure.reason if trial.failure is not None else "no reason given"
        typer.echo(f"failed: {reason}")
    else:
        typer.echo(f"{report.describe(trial.candidate)} on {trial.measurement.device}")
        width = max(map(len, trial.values()), default=0)
        for name, value in trial.values().items():
            typer.echo(f"  {name:<{width}}  {report.number_text(value, trial.stderr(name))}")
    if not trial.ok:
        raise typer.Exit(1)


@app.command()
def proxy(
    job: JobFile,
    out: Annotated[Path, typer.Option(help="File to write, for workload.data.subset.")] = Path("subset.json"),
    size: Annotated[int, typer.Option(min=0, help="Sequences to choose; 0 for a tenth.")] = 0,
    candidates: Annotated[int, typer.Option(help="Candidates scored on all sequences.")] = 30,
    metric: Annotated[str, typer.Option(help="Whose ranking counts; default: the job's first.")] = "",
    override: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Keeps the scores; an earlier one is continued.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose the few proxy sequences that rank candidates as all of them do."""
    from autocomp import api
    from autocomp.job import Job
    from autocomp.proxy import choose_proxy

    checked = Job.from_yaml(job, override or ())
    folder = run_dir if run_dir is not None else api.new_run_dir(checked)
    say = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
    say(f"run directory: {folder}")
    chosen = choose_proxy(
        checked, out=out, size=size, candidates=candidates, metric=metric, run_dir=folder, say=say
    )
    if as_json:
        typer.echo(json.dumps(chosen.to_json(), indent=2))
    else:
        typer.echo(chosen.text())
        typer.echo(f"wrote {out}; search with: -o workload.data.subset={out}")


@app.command()
def export(
    run_dir: RunDir,
    select: Select,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    format: Annotated[
        str, typer.Option("--format", help="native, compressed-tensors, diffusers, ...")
    ] = "native",
) -> None:
    """Write one point of a front as a model folder."""
    from autocomp import api

    written = api.export(run_dir, select, format=format, out=out)
    typer.echo(f"wrote {written}")
    if format == "native":
        typer.echo(f"load it with: model = autocomp.load({str(written)!r})")
        typer.echo(f"try it with:  autocomp generate {written} 'Why is the sky blue?'")
    elif format == "diffusers":
        typer.echo(f"load it with: model = autocomp.load({str(written)!r}); images = model.sample(16)")
        typer.echo(f"look at it:   autocomp generate {written} --out samples.png")


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(help="A native or diffusers export, or any Hugging Face model folder.")
    ],
    prompt: Annotated[
        str, typer.Argument(help="What to continue or, for chat models, to answer; none for image models.")
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for all.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: int = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Image models: how many images.")] = 64,
    out: Annotated[Path, typer.Option(help="Image models: the picture to write.")] = Path("samples.png"),
    as_json: AsJson = False,
) -> None:
    """Let a model write or draw, on the runtime that a search measures, and say how fast it was."""
    from autocomp.exporters.base import export_format

    if export_format(folder) == "autocomp-diffusers":
        _generate_images(folder, images, out, threads, seed, as_json)
        return
    if not prompt:
        raise JobError(f"{str(folder)!r} is no export of an image model, so it needs a prompt")
    from dataclasses import asdict

    from autocomp.serving.generate import generate_text

    found = generate_text(
        folder, prompt, new_tokens=tokens, threads=threads, temperature=temperature, seed=seed, chat=chat
    )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    typer.echo(found.text)
    rate = f", {1e3 / found.decode_ms:.0f} tokens/s" if found.decode_ms else ""
    typer.echo(
        f"[{found.runtime}: {found.new_tokens} tokens at {found.decode_ms:.2f} ms{rate}; "
        f"prompt of {found.prompt_tokens} in {found.prefill_ms:.0f} ms]",
        err=True,
    )
    if found.reason:
        typer.echo(f"[not lean: {found.reason}]", err=True)


def _generate_images(folder: Path, images: int, out: Path, threads: int, seed: int, as_json: bool) -> None:
    """Write a picture of samples of a diffusers export, and say how long they took."""
    import time

    from autocomp.diffusion.loaded import load_diffusion
    from autocomp.workloads.serving import cpu_threads

    model = load_diffusion(folder)
    with cpu_threads(threads):
        began = time.perf_counter()
        model.save_grid(out, images, seed=seed)
        image_ms = (time.perf_counter() - began) * 1e3 / images
    steps = len(model.schedule)
    if as_json:
        found = {"picture": str(out), "images": images, "steps": steps, "image_ms": image_ms}
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"wrote {out}")
        typer.echo(f"[{images} images of {steps} steps at {image_ms:.2f} ms each]", err=True)


@app.command()
def doctor(
    as_json: AsJson = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: what is here.")] = "",
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time each weight format against 16 bits (seconds).")
    ] = True,
) -> None:
    """Say what this machine can execute, what is missing, and how to get it."""
    from autocomp import doctor as examination

    sections = examination.examine(device, speed)
    typer.echo(json.dumps(examination.to_json(sections), indent=2) if as_json else examination.text(sections))
    if examination.broken(sections):
        raise typer.Exit(1)


def _run(folder: Path, quiet: bool, call: Callable[[Callable[[Event], None]], StudyResult]) -> None:
    """Run or continue a study with a display, then print its front and what to do next."""
    from rich.console import Console

    from autocomp.progress import make_display

    console = Console(stderr=True)
    if not quiet:
        typer.echo(f"run directory: {folder}", err=True)
    try:
        with make_display(console, quiet) as display:
            result = call(display)
    except (AutocompError, KeyboardInterrupt):
        _say_resume(folder)
        raise
    if result.front.points or result.status == "finished":
        _print_front(result.front)
    if result.status != "finished":
        _say_resume(folder)
        raise typer.Exit(INTERRUPTED)
    _say_next(folder, result)
    if not result.front.points:
        raise typer.Exit(1)


def _say_resume(folder: Path) -> None:
    if (folder / "journal.jsonl").exists():
        typer.echo(f"everything measured is kept; continue with: autocomp resume {folder}", err=True)


def _say_next(folder: Path, result: StudyResult) -> None:
    from autocomp.progress import duration_text

    typer.echo(f"finished in {duration_text(result.seconds)}: {result.run_dir}", err=True)
    if result.front.points:
        goal = result.front.objectives[0]
        typer.echo(f"next: autocomp export {folder} --select '{goal}' --out DIR", err=True)


def _print_front(found: ParetoFront, selected: Trial | None = None) -> None:
    """A table as wide as a terminal, or aligned text when stdout goes elsewhere."""
    from autocomp import report

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(report.rich_table(found, selected))
    else:
        typer.echo(report.text(found, selected))
    if selected is not None:
        typer.echo(f"selected: trial {selected.number}, {report.describe(selected.candidate)}")


def _front_json(found: ParetoFront, selected: Trial | None) -> dict[str, Any]:
    return {
        "objectives": [str(o) for o in found.objectives],
        "constraints": [str(c) for c in found.constraints],
        "points": found.rows(),
        "selected": None if selected is None else selected.to_json(),
    }


def _draw(
    run_dir: Path,
    found: ParetoFront,
    selected: Trial | None,
    html: Path | None,
    png: Path | None,
    choices: Path | None,
) -> None:
    """Write the pictures that were asked for."""
    if html is None and png is None and choices is None:
        return
    from autocomp import choice_map, plots

    written = []
    try:
        if html is not None:
            written.append(plots.front_html(found, html, selected))
        if png is not None:
            written.append(plots.front_png(found, png, selected))
        if choices is not None and selected is not None:
            # The first map goes where it was asked for; spans beside choices get a name of their own.
            maps = choice_map.maps_of(run_dir, selected)
            for path, draw in zip(_map_paths(choices), maps.values(), strict=False):
                draw(path)
                written.append(path)
    except (OSError, ValueError) as error:  # a folder that can't be written, or a suffix nobody draws
        raise JobError(f"can't write the picture: {error}") from None
    for path in written:
        typer.echo(f"wrote {path}", err=True)


def _map_paths(choices: Path) -> list[Path]:
    """Where the first and the second map of a candidate go: ``map.png``, ``map_spans.png``."""
    return [choices, choices.with_stem(f"{choices.stem}_spans")]


def _read_candidate(path: Path) -> dict[str, Any]:
    """A mapping of decision names to options from a JSON or YAML file."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"can't read the candidate {str(path)!r}: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise JobError(f"{str(path)!r} must hold a mapping of decision names to options, or {{'*': option}}")
    return data


def set_up_logging() -> None:
    """Send the ``autocomp`` loggers to stderr at ``AUTOCOMP_LOG_LEVEL`` (``INFO``).

    Raises:
        JobError: the level is no level.
    """
    name = os.environ.get("AUTOCOMP_LOG_LEVEL", "INFO").upper()
    level = logging.getLevelNamesMapping().get(name)
    if level is None:
        raise JobError(f"AUTOCOMP_LOG_LEVEL = {name!r} is not one of DEBUG, INFO, WARNING, ERROR")
    root = logging.getLogger("autocomp")
    root.setLevel(level)
    for old in list(root.handlers):
        if not isinstance(old, logging.NullHandler):
            root.removeHandler(old)
    root.addHandler(_handler())
    root.propagate = False


def _handler() -> logging.Handler:
    """Colours for a terminal; one unwrapped line a record for anything else."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


def main() -> None:
    """Entry point of the ``autocomp`` command."""
    try:
        app()
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
