"""`evaluate`: figures of a model, with evidence controls beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.classify import AbsentOption, PresentOption, prompt_pairs
from med3dvlm.cli.common import DeviceOption, JsonOption, ModelOption, SeedOption, grouped
from med3dvlm.cli.store import StoreArgument, data_module

if TYPE_CHECKING:
    from med3dvlm.evaluate.tasks import Answerer, Cases, Run, Search
    from med3dvlm.evaluate.tasks.wording import TextScorer

app = typer.Typer(no_args_is_help=True, help="Measure a model.")

SplitOption = Annotated[str, typer.Option(help="Which split of the store.")]
ControlsOption = Annotated[
    int,
    typer.Option(min=0, help="Studies that are also run blank, swapped and shuffled; 0 for none."),
]


@dataclass(frozen=True)
class OutputOptions:
    """Where the results of a run go."""

    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write tables, predictions and report.html here."),
    ] = None
    as_json: JsonOption = False


@dataclass(frozen=True)
class RunOptions(OutputOptions):
    """Of a run that computes: where, and what it draws."""

    device: DeviceOption = "auto"
    seed: SeedOption = 0


@dataclass(frozen=True)
class BatchOptions(RunOptions):
    """Of a run that takes several volumes at a time."""

    batch_size: Annotated[int, typer.Option(min=1, help="Volumes, or texts, at a time.")] = 8


@dataclass(frozen=True)
class StoreOptions(BatchOptions):
    """A run over the studies of a store, as a whole and by a column, with its controls."""

    split: SplitOption = "test"
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many studies.")] = None
    by: Annotated[
        str | None,
        typer.Option(
            help="Also by the values of a column of the manifest or a key of the metadata."
        ),
    ] = None
    leaks: Annotated[
        bool, typer.Option("--leaks", help="With the studies that are also on another side.")
    ] = False
    controls: ControlsOption = 200

    def cases(self, store: str) -> Cases:
        """The studies; a column that they do not have is refused before anything is computed."""
        cases = _cases(store, self.split, self.limit, leaks=self.leaks)
        if self.by is not None:
            cases.column(self.by)
        return cases

    def how(self) -> dict[str, Any]:
        """What every evaluation of a store's cases is told."""
        names = ("controls", "by", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BertOptions:
    """BERTScore beside the counted metrics of wording."""

    bert: Annotated[
        str | None, typer.Option(help="Count BERTScore, by an encoder's folder or hub name.")
    ] = None
    bert_layer: Annotated[
        int | None, typer.Option(min=1, help="Whose output BERTScore compares; the last if not.")
    ] = None

    def scorers(self, device: str) -> dict[str, TextScorer]:
        """BERTScore by its name, the encoder loaded; nothing where it is not asked for."""
        if self.bert is None:
            if self.bert_layer is not None:
                raise typer.BadParameter("--bert-layer goes with --bert: give the encoder.")
            return {}
        from med3dvlm.evaluate.tasks import load_bert_score
        from med3dvlm.evaluate.wording import BERT_SCORE

        where = None if device == "auto" else device
        return {BERT_SCORE: load_bert_score(self.bert, layer=self.bert_layer, device=where)}


ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="radgraph, ratescore or green (RadEval's, extra radeval), or a metric of your own, "
        "package.module:function of (references, candidates); repeatable."
    ),
]
AnswererOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="'demo', a checkpoint folder, a hub name, or a control: always-no, question-only.",
    ),
]
ReportsOption = Annotated[
    str | None,
    typer.Option(help="A store whose split train is learned or drafted from; STORE by default."),
]


@app.command("retrieval")
@grouped
def retrieval(
    store: StoreArgument,
    model: ModelOption = "demo",
    *,
    options: StoreOptions,
) -> None:
    """R@1, 5 and 10 in both directions, as published and with a shared report as a hit.

    Example: `med3dvlm evaluate retrieval m3d.store --model runs/search --by modality`
    """
    cases = options.cases(store)
    dual = common.load_dual_encoder(model, options.device)
    _check(cases, dual.preparation)
    from med3dvlm.evaluate.tasks import evaluate_retrieval

    with common.progress_bar("evaluating") as progress:
        run = evaluate_retrieval(
            dual,
            cases,
            **options.how(),
            progress=progress,
        )
    _finish(run, options)


@app.command("report")
@grouped
def report(
    store: StoreArgument,
    model: ModelOption = "demo",
    search_model: Annotated[
        str | None,
        typer.Option(help="A dual encoder for the drafts beside; that of --model by default."),
    ] = None,
    reports: ReportsOption = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Probability above which a template asserts.")
    ] = 0.5,
    scorer: ScorerOption = None,
    *,
    wording: BertOptions,
    options: StoreOptions,
) -> None:
    """Wording, findings and CRG of drafted reports, beside nearest reports and templates.

    Example: `med3dvlm evaluate report ct-rate.store --model runs/instruction --limit 500`
    """
    from med3dvlm.evaluate.tasks import LanguageModel, evaluate_report

    scorers = _scorers(wording, scorer, options.device)
    cases = options.cases(store)
    answerer = LanguageModel(common.load_language_model(model, options.device))
    _check(cases, answerer.preparation)
    search, note = _search(model, search_model, options.device, cases, reports or store, threshold)
    with common.progress_bar("evaluating") as progress:
        run = evaluate_report(
            answerer,
            cases,
            search=search,
            scorers=scorers,
            **options.how(),
            progress=progress,
        )
    if note:
        run.results.notes.append(note)
    _finish(run, options)


@app.command("vqa")
@grouped
def vqa(
    store: StoreArgument,
    model: AnswererOption = "demo",
    reports: ReportsOption = None,
    *,
    wording: BertOptions,
    options: StoreOptions,
) -> None:
    """Closed questions by likelihood and by the published rule, yes or no, and open ones.

    Example: `med3dvlm evaluate vqa m3d.store --model always-no`
    """
    from med3dvlm.evaluate.tasks import QuestionOnly, evaluate_vqa

    scorers = wording.scorers(options.device)
    cases = options.cases(store)
    if model == QuestionOnly.label:
        answerer: Answerer = QuestionOnly(_questions(reports or store))
    else:
        answerer = _answerer(model, options.device)
    _check(cases, answerer.preparation)
    with common.progress_bar("evaluating") as progress:
        run = evaluate_vqa(
            answerer,
            cases,
            scorers=scorers,
            **options.how(),
            progress=progress,
        )
    _finish(run, options)


@app.command("zero-shot")
@grouped
def zero_shot(
    store: StoreArgument,
    model: ModelOption = "demo",
    present: PresentOption = None,
    absent: AbsentOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of train calibration, to be measured; it holds its prompts."),
    ] = None,
    *,
    options: StoreOptions,
) -> None:
    """Findings from prompts: AUROC, F1, accuracy, precision and recall of each.

    Example: `med3dvlm evaluate zero-shot ct-rate.store --model runs/search --split validation`
    """
    prompts = prompt_pairs(present, absent)
    cases = options.cases(store)
    dual = common.load_dual_encoder(model, options.device)
    _check(cases, dual.preparation)
    from med3dvlm.evaluate.calibration import Calibration
    from med3dvlm.evaluate.tasks import evaluate_zero_shot
    from med3dvlm.evaluate.tasks.zero_shot import PROMPTS

    with common.progress_bar("evaluating") as progress:
        run = evaluate_zero_shot(
            dual,
            cases,
            prompts=prompts or PROMPTS,
            calibration=None if calibration is None else Calibration.load(calibration),
            **options.how(),
            progress=progress,
        )
    _finish(run, options)


@app.command("twins")
@grouped
def twins(
    model: AnswererOption = "demo",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pairs of either kind.")] = 72,
    *,
    options: BatchOptions,
) -> None:
    """Phantoms that differ in one finding only: is the answer right for both?

    Example: `med3dvlm evaluate twins --model demo -n 180`
    """
    from med3dvlm.evaluate.tasks import QuestionOnly, evaluate_twins

    if model == QuestionOnly.label:
        answerer: Answerer = QuestionOnly(_phantom_questions(options.seed))
    else:
        answerer = _answerer(model, options.device)
    with common.progress_bar("evaluating") as progress:
        run = evaluate_twins(
            answerer,
            count=count,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=progress,
        )
    _finish(run, options)


@app.command("evidence")
@grouped
def evidence(
    model: ModelOption = "demo",
    search_model: Annotated[
        str | None, typer.Option(help="A dual encoder; that of --model by default.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Held-out studies.")] = 200,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method of maps; repeatable. All quick ones by default."),
    ] = None,
    slow: Annotated[
        int, typer.Option(min=0, help="Studies for integrated gradients and occlusion, too.")
    ] = 0,
    curves: Annotated[
        int, typer.Option(min=0, help="Studies with deletion and insertion curves.")
    ] = 20,
    *,
    options: RunOptions,
) -> None:
    """Do maps of evidence point at the lesion? On held-out phantoms with one lesion each.

    Example: `med3dvlm evaluate evidence -n 200 --slow 20`
    """
    from med3dvlm.evaluate.tasks import evaluate_evidence
    from med3dvlm.evidence import METHODS

    for name in method or ():
        if name not in METHODS:
            raise typer.BadParameter(f"--method {name!r} is unknown: use {', '.join(METHODS)}.")
    chosen = {} if method is None else {"methods": method}
    vlm = common.load_language_model(model, options.device)
    dual = common.load_dual_encoder(search_model or model, options.device)
    with common.progress_bar("evaluating") as progress:
        run = evaluate_evidence(
            vlm,
            dual,
            count=count,
            slow=slow,
            curve_studies=curves,
            seed=options.seed,
            progress=progress,
            **chosen,
        )
    _finish(run, options)


@app.command("calibration")
@grouped
def calibration(
    store: Annotated[
        str | None, typer.Argument(help="A prepared store; generated phantoms without.")
    ] = None,
    model: ModelOption = "demo",
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Studies to fit on, and to measure on.")
    ] = 200,
    fit_split: Annotated[str, typer.Option(help="Which split is fitted on.")] = "validation",
    split: SplitOption = "test",
    save: Annotated[
        bool, typer.Option("--save", help="Write calibration.json beside the model's weights.")
    ] = False,
    *,
    options: BatchOptions,
) -> None:
    """Fit confidences on one split and measure them on another, before and after.

    Example: `med3dvlm evaluate calibration --model demo -n 200 --save`
    """
    if fit_split == split:
        raise typer.BadParameter(f"--fit-split and --split are both {split}: fit on another.")
    from med3dvlm.evaluate.tasks import cases_of_phantoms, evaluate_calibration
    from med3dvlm.hub import checkpoint_folder, load_exact

    weights = load_exact(model, part="language").fingerprint()
    vlm = common.load_language_model(model, options.device)
    if store is None:
        fit, test = (
            cases_of_phantoms(count, vlm.preparation, seed=options.seed, split=name)
            for name in (fit_split, split)
        )
    else:
        fit, test = (_cases(store, name, count, leaks=False) for name in (fit_split, split))
    for cases in (fit, test):
        _check(cases, vlm.preparation)
    with common.progress_bar("evaluating") as progress:
        found, run = evaluate_calibration(
            vlm, fit, test, weights=weights, batch_size=options.batch_size, progress=progress
        )
    if save:
        folder = checkpoint_folder(model, "language")
        found.save(folder)
        common.note(f"saved: {folder / 'calibration.json'}")
    _finish(run, options)


@app.command("predictions")
@grouped
def predictions(
    file: Annotated[
        Path,
        typer.Argument(
            help=".jsonl or .csv with reference and prediction in each row, and if you like study, "
            "type and, of closed questions, answer_choice and choices."
        ),
    ],
    findings: Annotated[
        str | None, typer.Option(help="Read findings out of the texts, too: ct-rate or phantoms.")
    ] = None,
    scorer: ScorerOption = None,
    device: DeviceOption = "auto",
    *,
    wording: BertOptions,
    options: OutputOptions,
) -> None:
    """Wording, string rule and findings of texts that any model has written.

    Example: `med3dvlm evaluate predictions theirs.jsonl --findings ct-rate -o runs/theirs`
    """
    from med3dvlm.evaluate.findings import VOCABULARIES
    from med3dvlm.evaluate.tasks import evaluate_predictions, read_predictions

    if findings is not None and findings not in VOCABULARIES:
        known = ", ".join(VOCABULARIES)
        raise typer.BadParameter(f"--findings {findings!r} is unknown: use {known}.")
    rows = read_predictions(file)
    run = evaluate_predictions(
        rows,
        terms=None if findings is None else VOCABULARIES[findings],
        scorers=_scorers(wording, scorer, device),
    )
    _finish(run, options)


@app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="The --output of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="That of another.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the table here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test in pairs, study by study, whether two saved runs of one task differ.

    Example: `med3dvlm evaluate compare runs/before runs/after`
    """
    from med3dvlm.evaluate.tasks import compare_runs

    results = compare_runs(first, second)
    if output is not None:
        results.save(output)
    common.print_results(results, as_json)


@app.command("phantoms")
def phantoms(
    model: ModelOption = "demo",
    count: Annotated[int, typer.Option("--count", "-n", min=10, help="Held-out studies.")] = 500,
    controls: ControlsOption = 40,
    twins: Annotated[int, typer.Option(min=0, help="Pairs of either kind; 0 for none.")] = 36,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write tables (JSON, CSV, Markdown) here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Retrieval, questions, reports and twins on held-out phantoms, each with chance beside it.

    Example: `med3dvlm evaluate phantoms --model demo -n 500`
    """
    from med3dvlm.evaluate.phantoms import evaluate_on_phantoms

    dual = common.load_dual_encoder(model, device)
    vlm = common.load_language_model(model, device)
    with common.progress_bar("evaluating") as progress:
        result = evaluate_on_phantoms(
            dual,
            vlm,
            count=count,
            seed=seed,
            batch_size=batch_size,
            controls=controls,
            twins=twins,
            progress=progress,
        )
    if output is not None:
        result.save(output)
    common.print_results(result, as_json)


# --- what the commands share ------------------------------------------------------------------


def _cases(store: str, split: str, limit: int | None, *, leaks: bool) -> Cases:
    opened = data_module("store").Store(store)
    from med3dvlm.evaluate.tasks import cases_of_store

    return cases_of_store(opened, split, limit=limit, leaks=leaks)


def _check(cases: Cases, preparation: Any) -> None:
    """Refuse a model that wants other volumes; a control that looks at none wants any."""
    if preparation is None:
        return
    from med3dvlm.scan import compare_preparations

    compare_preparations(cases.preparation, preparation)


def _scorers(wording: BertOptions, names: list[str] | None, device: str) -> dict[str, TextScorer]:
    """What judges texts beside the counted metrics, by name, loaded."""
    from med3dvlm.evaluate.tasks import load_scorer

    return wording.scorers(device) | {name: load_scorer(name) for name in names or ()}


def _answerer(name: str, device: str) -> Answerer:
    from med3dvlm.evaluate.tasks import AlwaysNo, LanguageModel

    if name == AlwaysNo.label:
        return AlwaysNo()
    return LanguageModel(common.load_language_model(name, device))


def _questions(store: str) -> list[dict[str, Any]]:
    opened = data_module("store").Store(store)
    return [
        question
        for index in opened.in_split("train")
        for question in opened.study(int(index))["questions"] or ()
    ]


def _phantom_questions(seed: int, count: int = 1000) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from med3dvlm.data.phantoms import make_study

    studies = (make_study(index, seed=seed, split="train") for index in range(count))
    return [asdict(question) for study in studies for question in study.questions]


def _search(
    model: str,
    search_model: str | None,
    device: str,
    cases: Cases,
    reports: str,
    threshold: float,
) -> tuple[Search | None, str]:
    """What drafts without a language model, or the reason why nothing does."""
    from med3dvlm.evaluate.tasks import Search
    from med3dvlm.hub import CheckpointError

    try:
        dual = common.load_dual_encoder(search_model or model, device)
    except CheckpointError as error:
        if search_model is not None:
            raise
        return None, (
            f"No draft by the nearest report or by template: {error} Give a dual encoder in "
            "--search-model."
        )
    _check(cases, dual.preparation)
    opened = data_module("store").Store(reports)
    column = opened.table["report"].to_pylist()
    texts = [column[int(index)] for index in opened.in_split("train")]
    return Search(dual, [text for text in texts if text and text.strip()], threshold), ""


def _finish(run: Run, options: OutputOptions) -> None:
    if options.output is not None:
        run.save(options.output)
        common.note(f"page: {options.output / 'report.html'}")
    common.print_results(run.results, options.as_json)
