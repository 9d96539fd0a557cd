"""Reading the curves of a run as an expert would: what is there, how sure that is, and what to do about it.

Every threshold is a statement of statistics, and has its source beside it. A figure of accuracy over n images has the
binomial standard error sqrt(p (1 - p) / n); the loss has that of its mean over images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from raycifar.analysis.collapse import MIN_STEPS, collapse
from raycifar.data import CLASSES
from raycifar.models.recipes import recipe_from_json
from raycifar.recipes import Recipe, recipe_for

Row = dict[str, Any]

SIGMAS = 3.0  # a difference of so many standard errors is taken as real: Shewhart (1931), p = 0.0027
SPIKE_SIGMAS = 6.0  # of the robust spread of all changes: in a long run even 4 are met by chance
FIT = 0.2  # McFadden (1979): a pseudo-R² of 0.2 to 0.4 is an excellent fit, one below explains little
COARSE = 0.025  # half a 95 % interval of 5 points: architectures that are compared differ by less
DEAD = 0.9  # share of a layer's units that are silent for all images, above which little passes it
VANISHED = 1e-3  # first layer's gradient over the last's: bfloat16 keeps 3 digits of a sum
CONCENTRATED = 0.25  # share of a rise that is owed to a hundredth of the images; equal ones would have 3 or 4 %
OFF = 8.0  # factor from a recipe's own learning rate, the range that a search covers
GUESSING = math.log(CLASSES)
CALM = "Take a smaller --lr or a longer --warmup, or bound the gradients with --clip-norm 1."


@dataclass(frozen=True)
class Finding:
    """What a curve shows: `kind` is of the contract's list, `confidence` a probability, `epochs` where it is seen."""

    kind: str
    confidence: float
    evidence: str
    advice: str
    epochs: list[int] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunHistory:
    """A run as its files tell it: `result` is None while it has none, `history` may be empty."""

    run: dict[str, Any]
    history: Sequence[Any]
    result: dict[str, Any] | None

    @property
    def recipe(self) -> Recipe:
        return recipe_from_json(self.run["model"], self.run["recipe"])

    @property
    def images(self) -> int:
        return self.run["data"]["train"]

    @property
    def val_images(self) -> int:
        return self.run["data"]["val"]

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.images // self.recipe.batch_size)

    @property
    def validated(self) -> bool:
        return self.val_images > 0

    def column(self, name: str) -> np.ndarray:
        """Return a figure of each epoch; not a number where there is none."""
        return np.array([np.nan if row.get(name) is None else row[name] for row in self.history], float)

    @property
    def own(self) -> Recipe:
        """The model's own recipe."""
        return recipe_for(self.run["model"], self.recipe.pretrained)


def error(p: float, n: int) -> float:
    """Return the standard error of a share `p` of `n`."""
    return math.sqrt(max(p * (1 - p), 1 / n) / n)


def sure(z: float) -> float:
    """Return how likely it is that chance makes less than `z` standard errors."""
    return round(min(0.999, float(1 - 2 * stats.norm.sf(abs(z)))), 3)


def points(share: float) -> str:
    return f"{100 * share:.1f} points"


def read(story: RunHistory) -> list[Finding]:
    """Return what the curves of a run show, what matters most first."""
    if not story.history:
        return [*filter(None, [diverged(story)])]
    found: list[Finding] = []
    for rule in RULES:
        found += rule(story, found)
    if all(finding.kind in TRENDS for finding in found):
        found.append(healthy(story, found))
    return found


def has(found: Sequence[Finding], *kinds: str) -> bool:
    return any(finding.kind in kinds for finding in found)


# A network that doesn't learn -----------------------------------------------------------------------


def divergence(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    return [*filter(None, [diverged(story)])]


def diverged(story: RunHistory) -> Finding | None:
    failed = (story.result or {}).get("status") == "failed"
    reason = (story.result or {}).get("reason") or ""
    if failed and "finite" in reason:
        return Finding("divergence", 0.999, f"The run ended by itself: {reason.partition('. Try')[0]}.", CALM)
    if not story.history:
        return None
    last, rows = story.history[-1], [row["train_loss"] for row in story.history]
    if last["train_loss"] > 2 * GUESSING and last["train_loss"] > 1.5 * min(rows):
        evidence = (
            f"The training loss rose from {min(rows):.2f} (epoch {int(np.argmin(rows)) + 1}) to "
            f"{last['train_loss']:.2f} (epoch {last['epoch']}), more than twice that of guessing, "
            f"ln({CLASSES}) = {GUESSING:.4f}."
        )
        return Finding("divergence", 0.99, evidence, CALM, [last["epoch"]])
    return None


def broken(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    """Return the jump of the loss from which a run never came back, if there is one."""
    if has(found, "collapse", "divergence"):
        return []
    (name, losses), train = judged(story), story.column("train_loss")
    for k, z in jumps(losses):
        if not recovers(losses, k) and train[-1] > train[:k].min():  # else training goes on: it is overfitting
            cause, figures = why_spike(story, k)
            evidence = (
                f"At epoch {k + 1} the {name} loss jumps from {losses[k - 1]:.3f} to {losses[k]:.3f}, {z:.0f} times "
                f"the usual spread of its changes, and never comes back: it ends at {losses[-1]:.3f}. {cause}"
            )
            return [Finding("divergence", sure(z), evidence, CALM, [k + 1], figures)]
    return []


def collapsed(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    def dead(row: Row) -> bool:
        return collapse(row, story.images, max(MIN_STEPS, row["epoch"] * story.steps), CLASSES) is not None

    last = story.history[-1]
    if has(found, "divergence") or last["epoch"] * story.steps < MIN_STEPS or not dead(last):
        return []
    first = next(row["epoch"] for k, row in enumerate(story.history) if all(map(dead, story.history[k:])))
    z = (last["train_top1"] - 1 / CLASSES) / error(1 / CLASSES, story.images)
    cause, figures = why_dead(last.get("diagnostics"))
    evidence = (
        f"From epoch {first} to {last['epoch']} the training loss stands at that of guessing "
        f"({last['train_loss']:.4f}; ln({CLASSES}) = {GUESSING:.4f}) and {last['train_top1']:.2%} are right, "
        f"{abs(z):.1f} standard errors from chance (1 in {CLASSES}): the network has learned nothing. {cause}"
    )
    advice = "Take a smaller --lr or a longer --warmup; keep batch norm; look at the first layers' gradients."
    return [Finding("collapse", 0.999, evidence.strip(), advice, list(range(first, last["epoch"] + 1)), figures)]


def why_dead(signals: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return a sentence with the cause of a collapse, where one batch shows it, and its figures."""
    if not signals:
        return "", {}
    norms = list(signals["gradient_norms"].items())
    (first, small), (last, large) = norms[0], norms[-1]
    if signals["dead_relus"]:
        layer, share = max(signals["dead_relus"].items(), key=lambda item: item[1])
        if share >= DEAD:
            text = (
                f"Its ReLUs have died: in {layer}, {share:.0%} of the units are 0 for every image, so that no gradient "
                "passes."
            )
            return text, {"cause": "dead ReLUs", "layer": layer, "share": share}
    if small < VANISHED * large:
        text = (
            f"Its gradients vanish: {small:.1e} at {first}, {large:.1e} at {last}, and what reaches the input moves "
            "nothing."
        )
        return text, {"cause": "vanishing gradients", "ratio": small / large if large else 0.0}
    if small > large / VANISHED:
        text = f"Its gradients explode: {large:.1e} at {last}, {small:.1e} at {first}."
        return text, {"cause": "exploding gradients", "ratio": small / large if large else math.inf}
    return "", {}


def underfitting(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if has(found, "collapse", "divergence"):
        return []
    last = story.history[-1]
    loss = last.get("train_eval_loss") or last["train_loss"]
    fit = 1 - loss / GUESSING
    if fit >= FIT:
        return []
    evidence = (
        f"After epoch {last['epoch']} the loss on training images, scored as validation images are, is {loss:.3f}: a "
        f"share of {fit:.2f} of what there is to know (1 - loss / ln({CLASSES}); below {FIT} little is explained)."
    )
    if story.validated:
        evidence += f" The validation loss is {last['val_loss']:.3f}."
    advice = "Train for more --epochs, with a larger --lr, less augmentation or a larger model."
    return [Finding("underfitting", sure((FIT - fit) / 0.02), evidence, advice, [last["epoch"]], {"fit": fit})]


def learning_rate(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if story.recipe.optimizer != story.own.optimizer:
        return []  # each has a scale of its own
    lr, own = story.recipe.lr, story.own.lr
    ratio = lr / own if own else 1.0
    held = f"its peak is {lr:g}, the {story.run['model']} recipe's own is {own:g}"
    if has(found, "underfitting") and ratio <= 1 / OFF:
        small = 1 / max(ratio, 1e-9)
        evidence = f"The network has hardly moved, and the learning rate is {small:,.0f} times too small: {held}."
        return [Finding("learning-rate-low", 0.95, evidence, f"Take --lr {own:g}.", [], {"ratio": ratio})]
    losses = story.column("train_loss")
    rises = [k + 2 for k, step in enumerate(np.diff(losses)) if step > SIGMAS * spread_of_changes(losses)]
    unstable = has(found, "collapse", "divergence") or len(rises) >= max(2, len(losses) // 4)
    if unstable and ratio >= OFF:
        evidence = (
            f"Training broke down, and the learning rate is {ratio:,.0f} times that of a recipe that works: {held}."
        )
        return [Finding("learning-rate-high", 0.95, evidence, f"Take --lr {own:g}.", rises, {"ratio": ratio})]
    return []


# What single epochs show ----------------------------------------------------------------------------


def spread_of_changes(values: np.ndarray) -> float:
    """Return the robust standard deviation of the changes from epoch to epoch: 1.4826 times their median deviation."""
    changes = np.diff(values)
    return float(stats.median_abs_deviation(changes, scale="normal")) if len(changes) else math.inf


def judged(story: RunHistory) -> tuple[str, np.ndarray]:
    """Return the loss by which jumps are judged, and its name: validation's, where images are held out."""
    return ("validation", story.column("val_loss")) if story.validated else ("training", story.column("train_loss"))


def jumps(losses: np.ndarray) -> list[tuple[int, float]]:
    """Return the epochs (from 0) at which a loss rises out of all proportion, and by how many robust deviations.

    The last epoch is left out: its rise may be the beginning of anything.
    """
    if len(losses) < 5:
        return []
    changes, spread = np.diff(losses), spread_of_changes(losses)
    scores = (changes - np.median(changes)) / max(spread, 1e-9)
    return [(k, float(scores[k - 1])) for k in range(1, len(losses) - 1) if scores[k - 1] > SPIKE_SIGMAS]


def recovers(losses: np.ndarray, k: int) -> bool:
    """Return whether at least half of the rise at epoch k is undone later."""
    return bool(losses[k + 1 :].min() < (losses[k - 1] + losses[k]) / 2)


def spikes(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if has(found, "collapse", "divergence"):
        return []
    name, losses = judged(story)
    top1, images = (
        (story.column("val_top1"), story.val_images) if story.validated else (story.column("train_top1"), story.images)
    )
    result = []
    for k, z in jumps(losses):
        dip = (top1[k - 1] - top1[k]) / (error(top1[k], images) * math.sqrt(2))
        noise = story.column("val_loss_se")[k] * math.sqrt(2) if story.validated else 0.0
        if recovers(losses, k) and dip > SIGMAS and losses[k] - losses[k - 1] > SIGMAS * noise:
            cause, figures = why_spike(story, k)
            evidence = (
                f"At epoch {k + 1} the {name} loss jumps from {losses[k - 1]:.3f} to {losses[k]:.3f}, {z:.0f} times "
                f"the usual spread of its changes, while top-1 falls from {top1[k - 1]:.4f} to {top1[k]:.4f}; it "
                f"recovers after. {cause}"
            )
            advice = "Take a smaller --lr or a longer --warmup"
            advice += "." if story.recipe.clip_norm else ", or bound the gradients with --clip-norm 1."
            result.append(Finding("spike", sure(z), evidence.strip(), advice, [k + 1], figures))
    return result


def why_spike(story: RunHistory, k: int) -> tuple[str, dict[str, Any]]:
    """Return a sentence with what a spike at epoch k (from 0) coincided with, and its figures."""
    row, reasons, figures = story.history[k], [], {}
    lr = story.column("lr")
    if lr[k - 1] > 0 and lr[k] / lr[k - 1] > 2:
        reasons.append(f"the learning rate, {lr[k] / lr[k - 1]:.0f} times that of the epoch before ({lr[k]:.3g})")
        figures["learning_rate_ratio"] = lr[k] / lr[k - 1]
    if row.get("restarts"):
        reasons.append("a restart of the run")
        figures["restarts"] = row["restarts"]
    norms = story.column("grad_norm_max")
    usual = float(np.nanmedian(norms))
    if usual > 0 and norms[k] > 3 * usual:
        reasons.append(
            f"a gradient norm of {norms[k]:.2f} (usually {usual:.2f}) at step {row['grad_norm_max_step'] + 1}"
        )
        figures["gradient_norm_ratio"] = norms[k] / usual
    rise = row.get("rise") or {}
    if rise.get("fraction", 0) > CONCENTRATED:
        reasons.append(
            f"a few hard images: a hundredth of them make {rise['fraction']:.0%} of the rise of the training loss"
        )
        figures["images"] = rise["indices"]
    if not reasons:
        return "Nothing that was recorded coincides with it.", figures
    return f"It coincides with {'; with '.join(reasons)}.", figures


# What the ends of the curves show -------------------------------------------------------------------


def overfitting(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not story.validated or len(story.history) < 3 or has(found, "collapse", "divergence"):
        return []
    val, clean = story.column("val_loss"), story.column("train_eval_loss")
    se = story.column("val_loss_se")
    end = float(np.median(val[-3:]))
    best = int(np.argmin(val))
    z = (end - val[best]) / math.hypot(se[-1], se[best])
    last = story.history[-1]
    gap = last["train_eval_top1"] - last["val_top1"]
    gap_z = gap / math.hypot(
        error(last["val_top1"], story.val_images), error(last["train_eval_top1"], last["train_eval_images"])
    )
    if z < SIGMAS or gap_z < SIGMAS or clean[-1] >= clean[best]:
        return []
    seen = last["train_top1"] - last["val_top1"]
    hidden = gap - seen
    evidence = (
        f"From epoch {best + 1} on the validation loss rises, from {val[best]:.3f} to {end:.3f} ({z:.0f} standard "
        f"errors), while that of training images goes on falling ({clean[best]:.3f} to {clean[-1]:.3f}). At the end "
        f"training images are right {points(gap)} more often than validation images ({last['train_eval_top1']:.3f} and "
        f"{last['val_top1']:.3f}, both scored without augmentation)"
    )
    if hidden >= 0.005:
        evidence += f"; the training curve shows {points(seen)} of it, and regularisation hides {points(hidden)}"
    advice = (
        "Take more augmentation (--augment cutout, --mixup 0.5), weight decay, label smoothing or dropout, more "
        f"images, or the weights of epoch {best + 1}."
    )
    figures = {"gap": gap, "from_epoch": best + 1, "hidden_by_regularisation": hidden}
    return [Finding("overfitting", sure(z), f"{evidence}.", advice, list(range(best + 1, len(val) + 1)), figures)]


def validation_above_training(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    # A first epoch's training accuracy is a mean over all of its learning: validation after it must be higher.
    if not story.validated or len(story.history) < 2 or has(found, "collapse", "divergence"):
        return []
    last = story.history[-1]
    val_se = error(last["val_top1"], story.val_images)
    ahead = last["val_top1"] - last["train_top1"]
    z = ahead / math.hypot(val_se, error(last["train_top1"], story.images))
    if z < SIGMAS:
        return []
    clean_se = error(last["train_eval_top1"], last["train_eval_images"])
    clean_z = (last["val_top1"] - last["train_eval_top1"]) / math.hypot(val_se, clean_se)
    recipe = story.recipe
    causes = [
        name
        for name, on in (
            (f"augmentation ({recipe.augment})", recipe.augment != "none"),
            ("mixup or cutmix", recipe.mixup + recipe.cutmix > 0),
            ("dropout", recipe.dropout > 0),
            ("the running average of the weights", recipe.ema > 0),
        )
        if on
    ]
    evidence = (
        f"At epoch {last['epoch']} validation images are right {points(ahead)} more often than training images "
        f"({last['val_top1']:.4f} and {last['train_top1']:.4f}, {z:.0f} standard errors). Scored alike, without "
        f"augmentation and in evaluation mode, training images reach {last['train_eval_top1']:.4f}"
    )
    explained = clean_z < SIGMAS
    if explained:
        because = ", ".join([*causes, "that training accuracy is a mean over the epoch"])
        evidence += f": no less than validation images. It is explained by {because}."
        advice = "Nothing is wrong; judge the gap by the training accuracy in evaluation mode."
    else:
        evidence += ", still less: augmentation and running averages don't explain it."
        advice = "Look whether validation images are easier, or also stand among the training images."
    return [Finding("validation-above-training", sure(z), evidence, advice, [last["epoch"]], {"explained": explained})]


def validation_noise(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not story.validated or has(found, "collapse", "divergence"):
        return []
    top1 = story.column("val_top1")
    n, p = story.val_images, float(top1[-1])
    half = 1.96 * error(p, n)
    late = top1[len(top1) // 2 :] if len(top1) >= 10 else top1
    wiggle, ratio, chance = swings(story, late)
    sampled = half >= COARSE
    if not sampled and not (chance < 0.001 and wiggle > half and not has(found, "spike")):
        return []
    evidence = f"{n:,} validation images tell an accuracy of {p:.3f} to ± {points(half)} (95 %)."
    if math.isfinite(wiggle):
        evidence += f" From epoch to epoch the curve swings by {points(wiggle)} (standard deviation)"
        if math.isfinite(ratio):
            more = "more than" if chance < 0.001 else "no more than"
            evidence += (
                f", {more} sampling explains ({math.sqrt(ratio):.1f} times what the images that change sides make)"
            )
        evidence += "."
    if sampled:
        advice = "Read nothing into single epochs; hold out more images (--val-size 5000)."
    else:
        advice = "The network itself swings: take a smaller --lr, a larger --batch-size, or --ema 0.999."
    figures = {"images": n, "half_width": half, "swings": wiggle, "cause": "sampling" if sampled else "network"}
    confidence = 0.95 if sampled else sure(stats.norm.isf(chance / 2))
    return [Finding("validation-noise", confidence, evidence, advice, [], figures)]


def swings(story: RunHistory, top1: np.ndarray) -> tuple[float, float, float]:
    """Return how much a curve swings around its trend, over what sampling explains, and the chance of as much.

    The spread is estimated from second differences (Gasser, Sroka and Jennen-Steinmetz, 1986). The same images are
    scored at each epoch, so that sampling's part in a change is that of the images that changed sides (McNemar, 1947).
    """
    if len(top1) < 5:
        return math.nan, math.nan, 1.0
    second = top1[1:-1] - (top1[:-2] + top1[2:]) / 2
    variance = float((second**2).mean()) / 1.5
    moved = (story.column("val_gained") + story.column("val_lost"))[-len(top1) :]
    expected = float(np.nanmean(moved)) / story.val_images**2 / 2 if np.isfinite(moved).any() else math.nan
    ratio = variance / expected if expected and math.isfinite(expected) else math.nan
    chance = float(stats.chi2.sf(ratio * len(second), len(second))) if math.isfinite(ratio) else 1.0
    return math.sqrt(variance), ratio, chance


def trend(story: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not story.validated or len(story.history) < 4 or has(found, "collapse", "divergence", "overfitting"):
        return []
    top1 = story.column("val_top1")
    late = top1[-max(4, len(top1) // 2) :]
    slope, _, low, high = stats.theilslopes(late, alpha=0.95)
    epochs = list(range(len(top1) - len(late) + 1, len(top1) + 1))
    noise, last = error(float(top1[-1]), story.val_images), story.history[-1]
    over = (
        " The learning rate has fallen to its end: a longer schedule starts from a higher one, and may yet gain."
        if last["lr"] < story.recipe.lr / 20
        else ""
    )
    figures = {"slope": float(slope), "low": float(low), "high": float(high)}
    if low > 0 and low * len(late) > noise:
        evidence = (
            f"Over epochs {epochs[0]} to {epochs[-1]} validation top-1 still rises, by {points(float(slope))} an epoch "
            f"(95 %: {100 * low:.1f} to {100 * high:.1f})."
        )
        advice = "Train for more --epochs: the schedule stretches with them."
        return [Finding("improving", 0.95, evidence, advice, epochs, figures)]
    gain = max(0.0, float(high)) * len(late)
    if gain <= 2 * 1.96 * noise:
        evidence = (
            f"Over epochs {epochs[0]} to {epochs[-1]} validation top-1 no longer rises: by {100 * slope:+.2f} points "
            f"an epoch (95 %: {100 * low:+.2f} to {100 * high:+.2f}). As many epochs again would gain {points(gain)} "
            f"at most, which {story.val_images:,} images hardly tell.{over}"
        )
        figures["gain"] = gain
        return [Finding("plateau", 0.95, evidence, "Stop here, or change the recipe.", epochs, figures)]
    return []


def healthy(story: RunHistory, found: Sequence[Finding]) -> Finding:
    last = story.history[-1]
    if not story.validated:
        first = story.history[0]["train_loss"]
        evidence = f"The training loss fell from {first:.3f} to {last['train_loss']:.3f}; no images were held out."
    else:
        gap = last["train_eval_top1"] - last["val_top1"] if last.get("train_eval_top1") is not None else math.nan
        evidence = (
            f"The losses fell together, to {last['train_loss']:.3f} and {last['val_loss']:.3f}; validation top-1 is "
            f"{last['val_top1']:.4f}, {points(abs(gap))} {'below' if gap >= 0 else 'above'} training images that "
            "are scored alike, and nothing jumps, stalls or rises that shouldn't."
        )
    advice = "Nothing needs mending." + (" More epochs would help." if has(found, "improving") else "")
    return Finding("healthy", 0.9, evidence, advice)


RULES: Sequence[Callable[[RunHistory, Sequence[Finding]], list[Finding]]] = (
    divergence,
    collapsed,
    broken,
    underfitting,
    learning_rate,
    spikes,
    overfitting,
    validation_above_training,
    validation_noise,
    trend,
)
TRENDS = {"improving", "plateau"}


# Several seeds --------------------------------------------------------------------------------------


def seed_variance(model: str, top1: Sequence[float], images: int) -> Finding | None:
    """Return whether runs that differ in their seed alone differ by more than their test images explain.

    Runs that err independently differ by the binomial variance of p (1 - p) / n at most (Jordan, 2023,
    arXiv:2304.01910); more is instability. The variance of several runs follows chi-squared.
    """
    if len(top1) < 2:
        return None
    mean, variance = float(np.mean(top1)), float(np.var(top1, ddof=1))
    ratio = variance / error(mean, images) ** 2
    chance = float(stats.chi2.sf(ratio * (len(top1) - 1), len(top1) - 1))
    if chance >= 2 * stats.norm.sf(SIGMAS):
        return None
    evidence = (
        f"The {len(top1)} runs of {model} end between {min(top1):.4f} and {max(top1):.4f} of test top-1: a standard "
        f"deviation of {points(math.sqrt(variance))}, {math.sqrt(ratio):.1f} times what {images:,} test images explain."
    )
    advice = "Take a smaller --lr or a longer --warmup, and report more seeds."
    return Finding("seed-variance", round(1 - chance, 3), evidence, advice, [], {"ratio": math.sqrt(ratio)})
