"""What the page needs of a summary.json of schema goldfish.audit/2, and in words where one does not have it."""

from collections.abc import Callable
from typing import Any

Check = Callable[[Any, str], None]  # raises ValueError with the place, given as the second argument


def of(*kinds: type) -> Check:
    """A value of one of these types; float admits int, nothing but bool admits bool. Numbers are finite."""

    def check(value: Any, where: str) -> None:
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{where} must be {expected}, got {value!r:.80}")
        if isinstance(value, (int, float)) and not abs(value) < 1e300:  # 1e999 is valid JSON, and infinite
            raise ValueError(f"{where} must be a finite number, got {value!r:.80}")

    return check


def maybe(inner: Check) -> Check:
    return lambda value, where: None if value is None else inner(value, where)


def each(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        of(list)(value, where)
        for i, item in enumerate(value):
            inner(item, f"{where}[{i}]")

    return check


def named(inner: Check) -> Check:
    """An object whose keys are not known beforehand."""

    def check(value: Any, where: str) -> None:
        of(dict)(value, where)
        for key, item in value.items():
            inner(item, f"{where}.{key:.40}")

    return check


def fields(**checks: Check) -> Check:
    """An object that has these keys, and perhaps others."""

    def check(value: Any, where: str) -> None:
        of(dict)(value, where)
        for key, inner in checks.items():
            if key not in value:
                has = ", ".join(f"{key!r:.40}" for key in value) or "nothing"
                raise ValueError(f"{where}: {key!r} is missing; it has {has}")
            inner(value[key], f"{where}.{key}")

    return check


def one_of(*words: str) -> Check:
    def check(value: Any, where: str) -> None:
        if value not in words:
            raise ValueError(f"{where} must be one of {', '.join(words)}, got {value!r:.80}")

    return check


def estimate(value: Any, where: str) -> None:
    """docs/audit.md, "Estimates"."""
    number = maybe(of(float))
    fields(n=of(int), documents=of(int), lower95=number, upper95=number)(value, where)
    points = [key for key in ("rate", "mean", "value") if key in value]
    if len(points) != 1:
        raise ValueError(f"{where}: expected one of rate, mean and value, got {', '.join(points) or 'none'}")
    number(value[points[0]], f"{where}.{points[0]}")
    if "rate" in value:
        fields(k=of(int))(value, where)
        if not 0 <= value["k"] <= value["n"]:
            raise ValueError(f"{where}: expected 0 <= k <= n, got k={value['k']}, n={value['n']}")
    low, high = value["lower95"], value["upper95"]
    if low is not None and high is not None and low > high:
        raise ValueError(f"{where}: expected lower95 <= upper95, got {low} and {high}")
    if "rate" in value and any(end is not None and not 0 <= end <= 1 for end in (low, high)):
        raise ValueError(f"{where}: expected 0 <= lower95 <= upper95 <= 1, got {low} and {high}")
    maybe(of(str))(value.get("reason"), f"{where}.reason")


_NUMBER, _TEXT, _COUNT = maybe(of(float)), of(str), of(int)
_SAMPLING = fields(
    name=_TEXT,
    impossible=estimate,
    extractable=each(fields(n=_COUNT, p=of(float), windows=estimate)),
    n_needed=each(fields(p=of(float), log10_least=_NUMBER, log10_median=_NUMBER)),
    expected=each(fields(n=_COUNT, share=estimate)),
)
_ESTIMATES = (
    "exact_match", "exact_match_nontrivial", "trivial", "token_accuracy", "teacher_forced_accuracy", "nll",
    "rouge_l_text", "rouge_l_ids", "longest_run", "edit_similarity", "first_divergence",
)  # fmt: skip
_OF_RULES = ("teacher_forced_accuracy_dropped", "teacher_forced_accuracy_kept", "first_divergence_dropped")
_ATTRIBUTION = ("dropped_share", "hazard_ratio", "hazard_dropped", "hazard_kept", "accuracy_gap")
_SPLIT = fields(
    n=_COUNT,
    documents=_COUNT,
    skipped=_COUNT,
    settled=_COUNT,
    **dict.fromkeys(_ESTIMATES, estimate),
    **dict.fromkeys(_OF_RULES, maybe(estimate)),
    prefix_sweep=each(fields(prefix_length=_COUNT, exact_match=estimate)),
    offset_sweep=each(fields(offset=_COUNT, exact_match=estimate)),
    strata=maybe(each(fields(count_from=_COUNT, count_to=_COUNT, exact_match=estimate))),
    sampling=each(_SAMPLING),
    beam_search=maybe(each(fields(beams=_COUNT, exact_match=estimate))),
    attribution=maybe(
        fields(
            **dict.fromkeys(_ATTRIBUTION, estimate),
            decisions=fields(suffixes=_COUNT, repeated=_COUNT, several=_COUNT),
            notes=each(_TEXT),
        )
    ),
)
_TPR = each(fields(fpr=of(float), tpr=estimate))


def _roc(value: Any, where: str) -> None:
    each(each(of(float)))(value, where)
    if not value or any(len(point) != 2 or not 0 <= min(point) <= max(point) <= 1 for point in value):
        raise ValueError(f"{where} must be points of two shares each, got {value!r:.80}")


_ATTACK = fields(auc=estimate, tpr=_TPR, roc=_roc)
_HEADLINE = fields(attack=_TEXT, auc=estimate, tpr=_TPR)
_MEASURED = fields(
    attacks=named(_ATTACK),
    blind=named(_ATTACK),
    confounded=of(bool, type(None)),
    headline=maybe(_HEADLINE),
    exposure=fields(mean=of(float), greatest=of(float), ceiling=of(float), candidates=_COUNT),
)


def _membership(value: Any, where: str) -> None:
    _MEASURED(value, where)
    if not value["attacks"]:
        raise ValueError(f"{where}.attacks is empty: there is always one")
    if value["headline"] is None:
        fields(reason=_TEXT)(value, where)


_OUTCOME = one_of("PASS", "FAIL", "INCONCLUSIVE")
_QUESTION = fields(
    question=_TEXT,
    asks=_TEXT,
    outcome=_OUTCOME,
    limit=of(float),
    estimate=maybe(estimate),
    control=maybe(estimate),
    why=_TEXT,
)


def _splits(value: Any, where: str) -> None:
    named(of(dict))(value, where)
    if not value or not value.keys() <= {"members", "heldout"}:
        raise ValueError(f"{where} must hold members, heldout or both, got {sorted(value)!r:.80}")
    named(_SPLIT)(value, where)


SUMMARY = fields(
    name=_TEXT,
    checkpoint=_TEXT,
    rule=of(dict, type(None)),
    protocol=fields(
        prefix_length=_COUNT,
        suffix_length=_COUNT,
        offsets=each(_COUNT),
        sampling=each(fields(temperature=of(float), top_k=_NUMBER, top_p=_NUMBER)),
        beams=maybe(each(_COUNT)),
        control=maybe(_TEXT),
    ),
    versions=of(dict),
    splits=_splits,
    membership=maybe(_membership),
    verdict=fields(outcome=_OUTCOME, sentence=_TEXT, not_tested=each(_TEXT), questions=each(_QUESTION)),
)
