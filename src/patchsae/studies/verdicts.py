"""What holds of the paper: each of its claims, its number, ours, and a verdict by a rule that stands in the code.

Everything is read from the tables that the notebooks wrote. A claim whose table is not there is not testable here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from patchsae.config import Profile
from patchsae.studies.adaptation import seed_means, who_decides
from patchsae.studies.intervals import mean_interval, wilson_interval

#: Precision from which a latent has a concept (notebook 09), accuracy from which a readout has nothing left to gain,
#: and points from which a task has a gain.
BAR, CEILING, GAIN = 0.7, 0.99, 5
VERDICTS = ("reproduced", "reproduced with a caveat", "contradicted", "not testable here")

Tables = Callable[[str], pd.DataFrame]


class Finding(NamedTuple):
    """Our number with its interval, whether the claim holds by its rule, and what to bear in mind."""

    ours: float
    low: float
    high: float
    holds: bool
    caveat: str = ""


class Claim(NamedTuple):
    """``claim``: what the paper says, with the unit of the numbers; ``paper``: its number; ``notebook``: where it is
    looked at; ``measure``: tables of a profile -> what came out."""

    claim: str
    paper: str
    notebook: str
    measure: Callable[[Tables], Finding]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _over_seeds(rows: pd.DataFrame, values) -> tuple[float, float, float]:
    """Mean over rows and seeds, and its t interval over seeds, of values that belong to rows."""
    means = seed_means(rows.assign(accuracy=values, every=""), ["every"])
    return tuple(means[["accuracy", "low", "high"]].iloc[0])


def splicing(tables: Tables) -> Finding:
    """Fewer than five points at the upper end of the interval over seeds."""
    rows = tables("table2").query("configuration == 'default'")
    found = _over_seeds(rows, 100 * (rows["accuracy_original"] - rows["accuracy_spliced"]))
    return Finding(*found, holds=found[2] < 5)


def contrastive_loss(tables: Tables) -> Finding:
    """It falls: the interval over seeds lies below 0."""
    rows = tables("table2").query("configuration == 'default'")
    found = _over_seeds(rows, rows["contrastive_spliced"] - rows["contrastive_original"])
    return Finding(*found, holds=found[2] < 0)


def class_latents(tables: Tables) -> Finding:
    """It costs more than ten latents alike in frequency and activation: the paired interval lies above 0."""
    row = tables("05_differences").query("control == 'matched' and mode == 'off' and k == 10").iloc[0]
    found = -100 * row["difference"], -100 * row["high"], -100 * row["low"]
    return Finding(*found, holds=found[1] > 0)


def random_latents(tables: Tables) -> Finding:
    """Fewer than five points on average; a caveat where ten are no small part of the dictionary."""
    rows = tables("ablation")
    spliced = rows.query("selection == 'random' and mode == 'spliced'")["accuracy"].mean()
    removed = rows.query("selection == 'random' and mode == 'off' and k == 10")
    found = _over_seeds(removed, 100 * (spliced - removed["accuracy"]))
    many = rows.query("mode == 'spliced'")["k"].max()
    return Finding(*found, holds=found[0] < 5,
                   caveat=f"ten are {_percent(10 / many)} of the latents" if many < 1000 else "")


def dataset_latents(tables: Tables) -> Finding:
    """Less than a tenth of the accuracy of all latents, at the upper end of the interval."""
    row = tables("ablation").query("selection == 'dataset' and mode == 'on' and k == 10").iloc[0]
    whole = tables("ablation").query("mode == 'spliced'")["accuracy"].mean()
    return Finding(*(100 * row[["accuracy", "low", "high"]]), holds=row["high"] < whole / 10)


def _gains(tables: Tables, half: str) -> pd.DataFrame:
    """MaPLe's gain in points on a half: columns task, seed, gain."""
    rows = tables("table1").query("half == @half").set_index("task")
    plain = rows.query("method == 'zero-shot'")["accuracy"]
    maple = rows.query("method == 'maple'")
    return maple.assign(gain=100 * (maple["accuracy"] - plain.reindex(maple.index))).reset_index()


def gain_on_base(tables: Tables) -> Finding:
    """The interval over seeds lies above 0; a caveat where three of many tasks make four fifths of the gain."""
    rows = _gains(tables, "base")
    by_task = rows.groupby("task")["gain"].mean().sort_values()
    found, most = _over_seeds(rows, rows["gain"]), by_task.tail(3)
    few = len(by_task) > 5 and most.sum() > 0.8 * by_task.sum()
    caveat = f"{', '.join(most.index[::-1])} make {_percent(min(1, most.sum() / by_task.sum()))} of it" if few else ""
    return Finding(*found, holds=found[1] > 0, caveat=caveat)


def gain_on_novel(tables: Tables) -> Finding:
    """The interval over seeds reaches 0; a caveat where the mean is a loss."""
    rows = _gains(tables, "novel")
    found = _over_seeds(rows, rows["gain"])
    return Finding(*found, holds=found[2] >= 0, caveat="it loses, within the interval" if found[0] < 0 else "")


def same_latents(tables: Tables) -> Finding:
    """Eight of ten stay, at the lower end; a caveat where LoRA, which gains as much, keeps fewer."""
    row = tables("07_group_ranks").query("upper == 10 and group == 'high'").iloc[-1]
    others = tables("07_fidelity").query("method == 'lora'")["group high"].mean()
    return Finding(*row[["mean", "low", "high"]], holds=row["low"] >= 8,
                   caveat=f"of prompts; LoRA keeps {others:.1f}" if others < 8 else "")


def latents_that_enter(tables: Tables) -> Finding:
    """Less than half a latent a class, at the upper end; a caveat where with LoRA more enter."""
    row = tables("07_group_ranks").query("upper == 10 and group == 'low to high'").iloc[-1]
    others = tables("07_fidelity").query("method == 'lora'")["group low to high"].mean()
    return Finding(*row[["mean", "low", "high"]], holds=row["high"] < 0.5,
                   caveat=f"of prompts; with LoRA {others:.1f} enter" if others > 0.5 else "")


def who_classifies(tables: Tables) -> Finding:
    """Exchanging the model that classifies moves accuracy more than exchanging the counts, over tasks; a caveat where
    prompt tokens that say nothing of the image leave less than half of that, or one task makes more than half."""
    def ahead(second: str) -> pd.Series:
        rows = who_decides(tables("07_masking_base"), second)
        return 100 * (rows["by who classifies"] - rows["by who selects"])

    by_task, sealed = ahead("adapted"), ahead("mean prompts").mean()
    (low,), (high,) = mean_interval(by_task.to_numpy()[:, None])
    most = by_task.idxmax()
    caveats = {f"{sealed:.1f} without what prompts have seen": sealed,
               f"{by_task.drop(most).mean():.1f} without {most}": by_task.drop(most).mean()}
    return Finding(by_task.mean(), low, high, holds=low > 0,
                   caveat=", ".join(text for text, left in caveats.items() if left < by_task.mean() / 2))


def readable_before(tables: Tables) -> Finding:
    """Of tasks with five points of gain on base classes, a readout of the latents before reaches more than half of the
    gain, and becomes better by less than half of it; the caveat says where it had nothing left to gain."""
    rows = tables("07_remapping").query("half == 'base' and gain >= @GAIN / 100")
    (low,), (high,) = mean_interval(100 * rows[["remapped"]].to_numpy())
    before = tables("07_readout").query("half == 'base' and what == 'before'").set_index("task")["accuracy"]
    full = [task for task in rows["task"] if before[task] >= CEILING]
    caveat = f"{len(rows)} tasks have a gain" + (f"; on {', '.join(full)} nothing new could show" if full else "")
    return Finding(100 * rows["remapped"].mean(), low, high, caveat=caveat,
                   holds=rows["remapped"].mean() > 0.5 and bool((rows["new"] < rows["gain"] / 2).all()))


def nothing_new(tables: Tables) -> Finding:
    """From a few images MaPLe gains less than five points, at the upper end, on tasks that take something new; a
    caveat where another method does gain there."""
    rows = tables("08_measures").query("truth == 'new'")
    maple = rows.query("method == 'maple' and images == 'shots'")
    found = _over_seeds(maple, 100 * maple["gain"])
    (method, images), best = max(rows.groupby(["method", "images"])["gain"].mean().items(), key=lambda item: item[1])
    caveat = f"{method} on {'all images' if images == 'all' else 'as few'} gains {100 * best:.0f}"
    return Finding(*found, holds=found[2] < GAIN, caveat=caveat if 100 * best > GAIN else "")


def ranks_tell(tables: Tables) -> Finding:
    """Where fine-tuning learned something new more latents enter the first ranks than where it remapped: the interval
    of the area under the ROC curve lies above one half; a caveat where LoRA's does not."""
    rows = tables("verdict_measures").query("measure == 'latents that enter' and images == 'all'").set_index("method")
    row, lora = rows.loc["fine-tuning"], rows.loc["lora"]
    return Finding(*row[["area", "low", "high"]], holds=row["low"] > 0.5,
                   caveat=f"with LoRA {lora['area']:.2f}, no better than a coin" if lora["low"] <= 0.5 else "")


def fits_the_adapted(tables: Tables) -> Finding:
    """Fewer than five points more than of CLIP; a caveat where it is more at all."""
    rows = tables("07_fidelity")
    rows = rows.assign(cost=100 * (rows["accuracy_original"] - rows["accuracy_spliced"]))
    maple = rows.query("method == 'maple'")
    found = _over_seeds(maple, maple["cost"] - rows.query("method == 'zero-shot'")["cost"].mean())
    return Finding(*found, holds=found[0] < 5, caveat="it fits less well than CLIP" if found[1] > 0 else "")


def concepts(tables: Tables) -> Finding:
    """More of the concepts have a latent than the best control finds: the interval over concepts lies above 0."""
    rows = tables("09_recovery").query("configuration == 'default' and kind == 'together'").set_index("method")
    best = rows.loc[rows.drop(["autoencoder", "linear probe"], errors="ignore")["share"].idxmax()]
    return Finding(*(100 * best[["minus", "minus_low", "minus_high"]]), holds=best["minus_low"] > 0,
                   caveat=f"the best control, {best.name}, finds {_percent(best['share'])}")


def entropy_marks_concepts(tables: Tables) -> Finding:
    """The lower the entropy the higher the precision: the coefficient's interval lies below 0."""
    row = tables("09_regression").set_index("term").loc["label entropy"]
    return Finding(*row[["coefficient", "low", "high"]], holds=row["high"] < 0)


def monosemantic(tables: Tables) -> Finding:
    """The difference of means lies above 0 with its interval; a caveat where the medians hardly differ."""
    rows = tables("09_single_latents").query("measure == 'monosemanticity'").dropna()
    trained, untrained = (rows.query("method == @name")["value"] for name in ("trained", "untrained"))
    interval = ttest_ind(trained, untrained, equal_var=False).confidence_interval()
    medians = trained.median(), untrained.median()
    return Finding(trained.mean() - untrained.mean(), *interval, holds=interval.low > 0,
                   caveat="medians of {:.2f} and {:.2f}".format(*medians) if np.ptp(medians) < 0.05 else "")


def keeps_its_concept(tables: Tables) -> Finding:
    """More than half of the latents with a concept have it on other tasks; a caveat where on one task most lose it."""
    rows = tables("09_transfer").query("home >= @BAR")
    kept = wilson_interval((rows["there"] >= BAR).to_numpy())
    by_task = (rows["there"] >= BAR).groupby(rows["task"]).mean()
    return Finding(*(100 * kept[name] for name in ("accuracy", "low", "high")), holds=kept["low"] > 0.5,
                   caveat=f"{_percent(by_task.min())} on {by_task.idxmin()}" if by_task.min() < 0.5 else "")


def two_clouds(tables: Tables) -> Finding:
    """Between 5 and 95 % of the latents fire on fewer than one image in a hundred, and the others are stronger; asked
    of dictionaries of a thousand latents and more."""
    table = tables("02_latent_scatter")
    if len(table) < 1000:
        raise LookupError
    rare = np.log10(table["frequency"].clip(lower=1e-9)) < -2
    gap = table["mean_activation"][~rare].median() - table["mean_activation"][rare].median()
    return Finding(100 * rare.mean(), np.nan, np.nan, holds=0.05 < rare.mean() < 0.95 and gap > 0)


CLAIMS = (
    Claim("Splicing the autoencoder in costs little accuracy (points)", "3.4", "01", splicing),
    Claim("The contrastive loss falls when it is spliced in", "-0.08", "01", contrastive_loss),
    Claim("Latents form two clouds, one rare and weak (% rare)", "a picture", "02", two_clouds),
    Claim("Removing ten latents of the class costs more than ten alike (points)", "38, alone", "05", class_latents),
    Claim("Removing ten random latents costs nothing (points)", "a curve", "05", random_latents),
    Claim("Latents of the whole data set tell no classes apart (% right, ten on)", "a curve", "05", dataset_latents),
    Claim("MaPLe gains on base classes (points)", "12.6", "06", gain_on_base),
    Claim("MaPLe does not lose on novel classes (points)", "0.1", "06", gain_on_novel),
    Claim("A class's top latents are the same after adaptation (of ten)", "10.4 of 11", "07", same_latents),
    Claim("Hardly a latent enters from beyond the first hundred (a class)", "0.6", "07", latents_that_enter),
    Claim("Who classifies decides, not who selects the latents (points)", "a curve", "07", who_classifies),
    Claim("What is gained was there before (% of the gain)", "argued", "07", readable_before),
    Claim("Adaptation learns nothing new (MaPLe's points on tasks that are new)", "argued", "08", nothing_new),
    Claim("Whether top latents stay tells remapping from learning (area under the curve)", "assumed", "08", ranks_tell),
    Claim("CLIP's autoencoder fits the adapted model (points lost more)", "a curve", "07", fits_the_adapted),
    Claim("Latents have concepts that others do not find (points of 100)", "examples", "09", concepts),
    Claim("Low label entropy marks such latents (coefficient)", "a rule", "09", entropy_marks_concepts),
    Claim("Latents are more monosemantic than untrained ones", "examples", "09", monosemantic),
    Claim("Latents keep their concept on other data (%)", "examples", "09", keeps_its_concept),
)


def verdicts(profile: Profile) -> pd.DataFrame:
    """``verdicts.csv``: columns claim, paper, ours, low, high, verdict, notebook, caveat.

    ``verdict`` is one of ``VERDICTS``.
    """
    def tables(name: str) -> pd.DataFrame:
        return pd.read_csv(profile.figures_dir / f"{name}.csv")

    return pd.DataFrame([_row(claim, tables) for claim in CLAIMS])


def _row(claim: Claim, tables: Tables) -> dict:
    try:
        found = claim.measure(tables)
        verdict = VERDICTS[bool(found.caveat) if found.holds else 2]
    except (LookupError, FileNotFoundError):  # no such table, or no such rows in it
        found, verdict = Finding(np.nan, np.nan, np.nan, False), VERDICTS[3]
    return {"claim": claim.claim, "paper": claim.paper, "ours": found.ours, "low": found.low, "high": found.high,
            "verdict": verdict, "notebook": claim.notebook, "caveat": found.caveat}


def as_markdown(table: pd.DataFrame) -> str:
    """The table as README has it."""
    lines = ["| The paper says | Its number | Ours, with 95 % interval | Verdict | Notebook |", "|---|---|---|---|---|"]
    for row in table.fillna({"caveat": ""}).itertuples():
        interval = f" [{row.low:.3g}, {row.high:.3g}]" if np.isfinite(row.low) else ""
        ours = f"{row.ours:.3g}{interval}" if np.isfinite(row.ours) else ""
        said = f"{row.verdict}: {row.caveat}" if row.caveat else row.verdict
        lines.append(f"| {row.claim} | {row.paper} | {ours} | {said} | {int(row.notebook):02} |")
    return "\n".join(lines)
