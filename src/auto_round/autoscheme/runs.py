"""From a request with AutoScheme to ordinary requests, one for each target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.autoscheme.candidates import Candidates, in_gguf, make_candidates
from auto_round.autoscheme.decision import Decision, Target, decide_on, refuse_unreachable, targets_of
from auto_round.autoscheme.groups import Fusing, nothing_fused
from auto_round.autoscheme.parts import ScoringSetting
from auto_round.autoscheme.plan_file import written
from auto_round.autoscheme.request import Option, gguf_base, is_gguf, read_options, with_scheme
from auto_round.autoscheme.scores import measured_scores
from auto_round.autoscheme.sensitivity import sensitivity
from auto_round.autoscheme.start import refuse_unmeasurable
from auto_round.calibration.rows import CalibrationRows, load_rows
from auto_round.calibration.sources import OfModel
from auto_round.config.options import Options
from auto_round.export.table import scale_dtype
from auto_round.facts.inputs import WEIGHT
from auto_round.facts.layer import Layer, Role
from auto_round.log import ProgressSink, ignore_progress, logger
from auto_round.pipeline.deciding.decide import Decided, decide
from auto_round.pipeline.deciding.fetch_rows import Data, fetch_rows, refuse_unknown_tokens
from auto_round.pipeline.deciding.open_model import (
    Opened,
    load_tokenizer,
    open_model,
    refuse_outputs,
    within_context,
)
from auto_round.pipeline.deciding.own_text import own_text
from auto_round.pipeline.deciding.placement import place_layers
from auto_round.pipeline.deciding.prepare import put_together
from auto_round.pipeline.deciding.request import Request, make_request
from auto_round.pipeline.deciding.unaddressed import without_kept
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.report.record import SENSITIVITY
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import Plan
from auto_round.schemes.request import plan_request
from auto_round.schemes.rules import find_layers
from auto_round.schemes.scheme import parse_scheme
from auto_round.schemes.siblings import expert_peers, fused_groups

ROWS, ROWS_OF_EXPERTS = 16, 64
"""Rows that sensitivities are measured on when the user says nothing; experts see a part of them each."""


@dataclass(frozen=True, slots=True)
class Given:
    """Objects that travel beside the options.

    Attributes:
        model: a model in memory instead of the named one.
        tokenizer: its tokenizer.
        dataset: calibration data instead of the named data set.
        score_dataset: data for sensitivities, where it is other data.
    """

    model: nn.Module | None = None
    tokenizer: Any = None
    dataset: Any = None
    score_dataset: Any = None


NOTHING = Given()


@dataclass(frozen=True, slots=True)
class Menu:
    """From picks to a run.

    Attributes:
        options: what the user asked for.
        listed: the schemes to choose from.
        candidates: what each of them means for each layer.
        embedding: name of the embedding that gets the largest of the options; None where the user or the
            choice decides, or nothing rounds it.
    """

    options: Options
    listed: Sequence[Option]
    candidates: Candidates
    embedding: str | None = None

    def run(self, picks: Sequence[int]) -> Options:
        """Options of the run that gives each group what was picked for it.

        The scheme that most layers get needs no rules, unless it is a GGUF type: that stands for a mixture.
        """
        candidates, plans = self.candidates, self.candidates.plans
        pairs = list(zip(candidates.groups, picks, strict=True))
        taken = [0] * len(self.listed)
        for names, pick in pairs:
            taken[pick] += sum(plans[pick].scheme_of(name) is not None for name in names)
        base = taken.index(max(taken))
        mixture = is_gguf(self.listed[base])
        rules = {
            name: written(plans[pick].scheme_of(name))
            for names, pick in pairs
            for name in names
            if mixture or pick != base or candidates.layers[name].block is None
        }
        if self.embedding is not None:
            rules[self.embedding] = self._largest()
        run = with_scheme(self.options, _base(self.options, self.listed, base), rules)
        return replace(run, chosen_layers=frozenset(name for names in candidates.groups for name in names))

    def _largest(self) -> str | dict[str, Any]:
        schemes = [parse_scheme(option.scheme) for option in self.listed]
        return written(max((s for s in schemes if s.quantized), key=lambda scheme: scheme.bits))


@plain_device()
def choose_schemes(
    options: Options, progress: ProgressSink = ignore_progress, given: Given = NOTHING
) -> tuple[Options, ...]:
    """The runs of a request: itself, or where AutoScheme is asked for one for each target.

    Args:
        options: what the user asked for.
        progress: receives an event whenever a part is measured.
        given: objects beside the options.

    Returns:
        Options with a scheme and a rule for each layer that differs from it, and folders of their own where
        there are several.

    Raises:
        AutoRoundError: the request is wrong, a target cannot be reached, or the model cannot be measured.
    """
    if not options.auto.asked:
        return (options,)
    listed = read_options(options)
    first = with_scheme(options, _base(options, listed, 0))
    request = make_request(_for_measuring(first), dataset=given.dataset)
    opened = open_model(request, model=given.model, tokenizer=given.tokenizer)
    candidates = make_candidates(
        opened.source.layers,
        {option.label: _plan(request, opened, option) for option in listed},
        options.auto.joined,
        fused=_fused(options, request),
    )
    refuse_unmeasurable(opened.source, candidates)
    targets = targets_of(options.auto)
    if not options.output.dry_run:
        refuse_outputs(opened, [_folder(options, target, several=len(targets) > 1) for target in targets])
    menu = Menu(options, listed, candidates)
    decided = _trial(menu, opened, given)
    if (embedding := _embedding(decided, opened)) is not None:
        if options.auto.chooses_embedding:
            menu = replace(menu, candidates=_with_embedding(menu, embedding, opened))
        else:
            menu = replace(menu, embedding=embedding)
        decided = _trial(menu, opened, given)
    candidates = menu.candidates
    for target in targets:
        refuse_unreachable(target, candidates, decided, opened)
    _refuse_rows(menu, opened, decided, given)
    setting = _setting(request, opened, decided, candidates, given)
    scores = measured_scores(setting, options.auto.score_method, progress, Clock())
    chosen = [decide_on(target, candidates, scores, decided, opened) for target in targets]
    for decision in chosen:
        logger.info("AutoScheme %s", decision.summary)
    measured = sensitivity(scores, candidates, options.auto.score_method, opened.source.blocks)
    return tuple(_run(menu, decision, measured, several=len(chosen) > 1) for decision in chosen)


def _for_measuring(options: Options) -> Options:
    """The same with the device and the memory that the user wants for measuring."""
    auto = options.auto
    device = options.model.device_map if auto.score_device_map is None else auto.score_device_map
    return replace(
        options,
        model=replace(options.model, device_map=device),
        memory=replace(options.memory, low_gpu_mem_usage=auto.score_low_gpu_mem_usage),
        calibration=replace(options.calibration, seqlen=auto.score_seqlen),
        given=options.given - {"seqlen"},  # which is of the run's own rows
    )


def _base(options: Options, listed: Sequence[Option], index: int) -> str | Mapping[str, Any]:
    scheme = listed[index].scheme
    return gguf_base(options, str(scheme)) if is_gguf(listed[index]) else scheme


def _plan(request: Request, opened: Opened, option: Option) -> Plan:
    """The plan that gives every layer an option."""
    source = opened.source
    wanted = replace(request.options.scheme, scheme=option.scheme)
    kind = parse_scheme(option.scheme, wanted.overrides()).data_type
    asked = plan_request(wanted, scale_dtype(request.formats, source.dtype, kind))
    own_plan = _gguf(request)
    if own_plan:
        beside = _rules_beside(opened)  # which such files round, and the head in any case
        rules = {key: rule for key, rule in (asked.layer_config or {}).items() if key not in beside}
        asked = replace(asked, quant_lm_head=not source.tied_head, layer_config=rules)
    plan = make_plan(
        source.layers,
        asked,
        blocks=source.blocks,
        tied_head=source.tied_head,
        other_names=sorted({name.rpartition(".")[0] for name in source.tensors}),
    )
    plan = without_kept(plan, source.layers, request.formats)
    if not own_plan:
        return plan
    fitted = {layer.name: in_gguf(layer, plan.scheme_of(layer.name)) for layer in source.layers}
    entries = {name: replace(entry, scheme=fitted[name]) for name, entry in plan.entries.items()}
    return replace(plan, entries=entries)


def _trial(menu: Menu, opened: Opened, given: Given) -> Decided:
    """A run that mixes all options; refused where no plan of the wanted formats can."""
    trial = _request_of_all(menu, given)
    return decide(trial, replace(opened, options=trial.options), quiet=True)


def _request_of_all(menu: Menu, given: Given) -> Request:
    return make_request(menu.run(menu.candidates.in_turn), dataset=given.dataset)


def _refuse_rows(menu: Menu, opened: Opened, decided: Decided, given: Given) -> None:
    """Fetch the rows of a run that tunes all blocks together, to hear now of what it would be refused for.

    It takes the most rows, and measuring takes hours. What is no refusal is said by the run. Data that can be
    read only once are left to it.

    Raises:
        AutoRoundError: too few rows, or such as the stage cannot take.
    """
    if decided.wanted.distill_steps and not isinstance(given.dataset, Iterator):
        trial = _request_of_all(menu, given)
        options = replace(within_context(trial.options, opened.source, quiet=True), tune=decided.wanted)
        opened = replace(opened, options=options)
        fetch_rows(opened, decided, trial.device, dataset=given.dataset, quiet=True)


def _gguf(request: Request) -> bool:
    """Whether the output is a GGUF file, which has rules of its own for plans."""
    return any(exporter.planner is not None for exporter in request.formats)


def _fused(options: Options, request: Request) -> Fusing:
    """What readers of the wanted formats fuse: of a GGUF file the experts alone, which are one tensor."""
    if _gguf(request):
        return expert_peers
    return fused_groups if options.auto.fused else nothing_fused


def _embedding(decided: Decided, opened: Opened) -> str | None:
    """Name of the token embedding where a format rounds it, and no rule of the user's names it."""
    found = [place for exporter in decided.exporters.values() if (place := exporter.embedding) is not None]
    if not found:
        return None
    name = found[0][1].removesuffix(WEIGHT)
    return None if any(name in names for names in _rules_beside(opened).values()) else name


def _rules_beside(opened: Opened) -> dict[str, list[str]]:
    """The user's rules that name tensors beside the layers, such as the embedding, and no layer."""
    layers = dict.fromkeys(layer.name for layer in opened.source.layers)
    beside = dict.fromkeys(name.removesuffix(WEIGHT) for name in opened.source.tensors)
    known = {**beside, **layers}
    found = {key: find_layers(key, known, "layer_config") for key in opened.options.scheme.layer_config or {}}
    return {key: names for key, names in found.items() if names and not any(n in layers for n in names)}


def _with_embedding(menu: Menu, name: str, opened: Opened) -> Candidates:
    """Candidates with the embedding among them."""
    tensor = opened.source.tensors[f"{name}{WEIGHT}"]
    place, shape = f"{name}{WEIGHT}", (tensor.shape[0], tensor.shape[1])
    layer = Layer(name, place, place, shape, tensor.dtype, None, Role.OUTSIDE)
    schemes = [parse_scheme(option.scheme) for option in menu.listed]
    return menu.candidates.with_embedding(
        layer, [in_gguf(layer, s if s.quantized else None) for s in schemes]
    )


def _setting(
    request: Request, opened: Opened, decided: Decided, candidates: Candidates, given: Given
) -> ScoringSetting:
    rows = _rows(request, opened, decided, given)
    refuse_unknown_tokens(rows.rows, opened.source)
    opened.source.refuse_untraceable(dtype=torch.float32)
    job = replace(
        put_together(request, opened, decided, Data(rows, len(rows.rows))),
        dtype=torch.float32,  # 8 bits lose less than bfloat16's own rounding does
        importance={},
        caches=None,
        placement=place_layers(request.devices, opened.source, decided.plan),  # other devices measure
    )
    return ScoringSetting(
        job, candidates, search=decided.tune.search, batch_size=request.options.auto.score_batch_size
    )


def _rows(request: Request, opened: Opened, decided: Decided, given: Given) -> CalibrationRows:
    options, source = request.options, opened.source
    auto = options.auto
    own = auto.score_dataset if given.score_dataset is None else given.score_dataset
    usual = options.calibration.dataset if given.dataset is None else given.dataset
    data = usual if own is None else own
    experts = any(layer.role is Role.EXPERT for layer in source.layers)
    tokenizer = opened.tokenizer
    if tokenizer is None and isinstance(data, str) and source.folder is not None:
        tokenizer = load_tokenizer(options, source, required=True)
    rows = load_rows(
        data,
        tokenizer,
        nsamples=auto.score_nsamples or (ROWS_OF_EXPERTS if experts else ROWS),
        seqlen=opened.options.calibration.seqlen,
        seed=options.calibration.seed,
        platform="model_scope" if options.model.platform == "model_scope" else "hf",
        of_model=OfModel(
            own_text=own_text(replace(opened, tokenizer=tokenizer), request.device, decided.dtype),
            prefix="score_",
        ),
    )
    if rows.missing:
        logger.warning(rows.missing)
    return rows


def _folder(options: Options, target: Target, *, several: bool) -> Path:
    """Output folder of one target: inside of the user's where there are several."""
    folder = Path(options.output.output_dir)
    return folder / target.folder if several else folder


def _run(menu: Menu, decision: Decision, measured: Mapping[str, Any], *, several: bool) -> Options:
    """The ordinary run of one decision, in a folder of its own where there are several."""
    run = menu.run(decision.choice.picks)
    folder = _folder(menu.options, decision.target, several=several)
    auto = replace(
        menu.options.auto, avg_bits=(), target_size=(), target_kl=None, scheme_options=(), shared_layers=()
    )
    return replace(
        run,
        auto=auto,
        output=replace(run.output, output_dir=str(folder)),
        chosen={**decision.document(menu.candidates), SENSITIVITY: measured},
    )
