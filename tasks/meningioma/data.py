"""Which cases there are, which of their labels are which class, and a check of every file before training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.wording import listed, quoted
from tasks.meningioma.cases import Case, CaseSet, Values, parse_labels
from tasks.meningioma.checking import Facts, examine_cases
from tasks.meningioma.layouts import list_cases
from tasks.meningioma.listing import Listing


@dataclass(frozen=True)
class Checked:
    """A set that can be trained on.

    Attributes:
        cases: the set.
        table: a row per case: patient, shape, spacing (mm), orientation, ml of each class, components, intensities.
    """

    cases: CaseSet
    table: pd.DataFrame


def load_cases(settings: DictConfig) -> Checked:
    """List and check the cases of ``data.path``: an nnU-Net or decathlon folder, plain folders, or a CSV.

    Raises:
        InputError: every problem of every file at once; or no case has a label; or the labels' values are not the
            classes'.
    """
    if settings.path is None:
        raise InputError("data.path is not set; give a folder of cases, an nnU-Net folder, or a CSV: data.path=FOLDER.")
    path = Path(settings.path)
    if not path.exists():
        raise InputError(
            f"data.path={path} does not exist; give a folder with a folder per case (CASE/t1c.nii.gz and "
            "CASE/seg.nii.gz), an nnU-Net folder, or a CSV with the columns case_id, image and label."
        )
    listing = list_cases(path, settings)
    known = _known_classes(settings, listing, path)
    facts = examine_cases(listing.cases, None if known is None else [v for group in known[1] for v in group])
    problems = [*listing.problems, *(problem for fact in facts for problem in fact.problems), *_shared(listing.cases)]
    problems += _channel_counts(listing.cases)
    labelled = [fact for case, fact in zip(listing.cases, facts, strict=True) if case.label is not None]
    notes = [*listing.notes, *(note for fact in facts for note in fact.notes)]
    if not problems and not labelled:
        problems.append(f"{path}: no case has a label; there is nothing to learn from.")
    if known is None:
        classes, values = _found_classes(labelled, path, problems, notes)
    else:
        classes, values = known
        problems += _strange(listing, facts, values, chosen=settings.labels is not None, notes=notes)
    notes += _emptiness(listing.cases, facts, classes, values, problems)
    if problems:
        raise InputError(listed(problems))
    folds = None if listing.folds is None else tuple(listing.folds)
    case_set = CaseSet(tuple(listing.cases), classes, values, notes, folds)
    return Checked(case_set, statistics(case_set, facts))


def statistics(cases: CaseSet, facts: Sequence[Facts]) -> pd.DataFrame:
    """A row per case."""
    rows = []
    for case, fact in zip(cases.cases, facts, strict=True):
        row = {
            "case_id": case.case_id,
            "patient": case.patient,
            "shape": " x ".join(map(str, fact.shape)),
            "spacing_mm": " x ".join(f"{s:.3g}" for s in fact.spacing),
            "orientation": fact.orientation,
            "lowest": fact.lowest,
            "highest": fact.highest,
            "components": fact.components if case.label is not None else np.nan,
        }
        for name, group in zip(cases.classes[1:], cases.values, strict=True):
            voxels = sum(fact.counts.get(value, 0) for value in group)
            row[f"{name}_ml"] = voxels * fact.voxel_ml if case.label is not None else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def overview(checked: Checked) -> list[str]:
    """The set in a few lines, for the log."""
    table, cases = checked.table, checked.cases
    labelled = table[table["components"].notna()]
    patients = len({case.patient for case in cases.cases})
    lines = [
        f"{len(table)} cases of {patients} patients, {len(labelled)} with a label; classes: {quoted(cases.classes)}"
    ]
    for column, what in (("shape", "shapes"), ("spacing_mm", "spacings in mm"), ("orientation", "orientations")):
        usual = Counter(table[column]).most_common(3)
        more = table[column].nunique() - len(usual)
        lines.append(f"{what}: " + ", ".join(f"{v} ({n})" for v, n in usual) + (f", {more} others" if more else ""))
    for name in cases.classes[1:]:
        ml = labelled[f"{name}_ml"]
        there = ml[ml > 0]
        if len(there):
            low, half, high = there.quantile([0, 0.5, 1])
            lines.append(f"{name}: in {len(there)} cases, {low:.3g} to {high:.3g} ml, median {half:.3g} ml")
    pieces = labelled["components"]
    lines.append(f"connected pieces: more than one in {int((pieces > 1).sum())} cases, at most {int(pieces.max())}")
    return lines


def _known_classes(settings: DictConfig, listing: Listing, path: Path) -> tuple[tuple[str, ...], Values] | None:
    if settings.labels is not None:
        given = OmegaConf.to_container(settings.labels, resolve=True)
        if not isinstance(given, dict):
            raise InputError(f"data.labels={given} must name classes and values, such as {{tumour: [1, 4]}}.")
        return parse_labels({str(name): value for name, value in given.items()}, "data.labels")
    return None if listing.labels is None else parse_labels(listing.labels, f"{path / 'dataset.json'}, labels")


def _found_classes(
    labelled: Sequence[Facts], path: Path, problems: list[str], notes: list[str]
) -> tuple[tuple[str, ...], Values]:
    """One class, where the labels hold one value; more must be named."""
    total: Counter[int] = Counter()
    for fact in labelled:
        total.update(fact.counts)
    if len(total) > 1:
        shown = ", ".join(f"{value} ({count} voxels)" for value, count in sorted(total.items())[:10])
        example = "[" + ", ".join(map(str, sorted(total)[:4])) + "]"
        problems.append(
            f"the labels of {path} hold the values {shown}; say which are which class, such as "
            f"data.labels={{tumour: {example}}}."
        )
        return ("background", "tumour"), ((1,),)
    (value,) = total or (1,)
    if value != 1:
        notes.append(f"the labels hold the value {value} alone: it is the class 'tumour'.")
    return ("background", "tumour"), ((value,),)


def _strange(listing: Listing, facts: Sequence[Facts], values: Values, chosen: bool, notes: list[str]) -> list[str]:
    """Values that no class has: background where the user chose classes, a problem where the data set defines them."""
    known = {value for group in values for value in group}
    if chosen:
        left: Counter[int] = Counter()
        for fact in facts:
            left.update({value: count for value, count in fact.counts.items() if value not in known})
        if left:
            shown = ", ".join(f"{value} ({count} voxels)" for value, count in sorted(left.items())[:10])
            notes.append(f"label values that data.labels does not name are background: {shown}.")
        return []
    problems = []
    for case, fact in zip(listing.cases, facts, strict=True):
        strange = {value: count for value, count in fact.counts.items() if value not in known}
        if strange:
            shown = ", ".join(f"{value} ({count} voxels)" for value, count in sorted(strange.items())[:10])
            problems.append(
                f"{case.label} holds {shown}, but the classes have the values {sorted(known)}; choose with data.labels."
            )
    return problems


def _emptiness(
    cases: Sequence[Case], facts: Sequence[Facts], classes: Sequence[str], values: Values, problems: list[str]
) -> list[str]:
    notes = []
    known = {value for group in values for value in group}
    pairs = zip(cases, facts, strict=True)
    sound = [(case, fact) for case, fact in pairs if case.label is not None and not fact.problems]
    empty = [case.case_id for case, fact in sound if not known & fact.counts.keys()]
    if sound and len(empty) == len(sound):
        problems.append(f"the labels of all {len(sound)} cases are empty; there is nothing to learn.")
    elif empty:
        have = "1 case has" if len(empty) == 1 else f"{len(empty)} cases have"
        notes.append(f"{have} an empty label, as controls have: {quoted(empty)}.")
    for name, group in zip(classes[1:], values, strict=True):
        if sound and len(empty) < len(sound) and not any(set(group) & fact.counts.keys() for _, fact in sound):
            problems.append(f"no label holds class '{name}' (values {list(group)}); take it out of data.labels.")
    without = [case.case_id for case in cases if case.label is None]
    if without:
        notes.append(f"{len(without)} cases have no label and are left out of training: {quoted(without)}.")
    return notes


def _shared(cases: Sequence[Case]) -> list[str]:
    """Patients on two sides of the split that the data bring."""
    sides: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.split:
            sides[case.patient].add(case.split)
    both = {patient: found for patient, found in sides.items() if len(found) > 1}
    return [
        f"patient '{patient}' is in {' and in '.join(sorted(found))}; keep all cases of a patient on one side."
        for patient, found in both.items()
    ]


def _channel_counts(cases: Sequence[Case]) -> list[str]:
    counts = Counter(len(case.images) for case in cases)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    odd = [case.case_id for case in cases if len(case.images) != usual]
    return [f"most cases have {usual} image(s), but {quoted(odd)} another number; every case needs the same channels."]
