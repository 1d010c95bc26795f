"""What is known about each bundled data set: meaning, units, source, citation."""

from dataclasses import dataclass
from textwrap import fill

PINHEIRO_BATES = (
    "Pinheiro, J. C. and Bates, D. M. (2000). Mixed-Effects Models in S and S-PLUS. Springer."
)
DAVIES_GOLDSMITH = (
    "Davies, O. L. and Goldsmith, P. L., eds (1972). Statistical Methods in Research and "
    "Production, 4th ed. Oliver and Boyd"
)
SIMULATED = "Simulated with R 4.2.2 for the documentation of lmmjax."
SIMULATED_CITATION = "None: not measured. Cite lmmjax."


@dataclass(frozen=True, repr=False)
class DatasetInfo:
    """Description of one bundled data set; printing it gives a readable page.

    Attributes
    ----------
    name : str
        Name that ``load_dataset`` knows.
    rows : int
        Number of rows.
    summary : str
        One line.
    description : str
        Design of the study, in a few sentences.
    columns : dict of str to str
        Meaning and unit of every column, in the order of the table.
    source : str
        Where the numbers were taken from.
    citation : str
        What to cite when they are used.
    synonyms : tuple of str
        Other names that ``load_dataset`` accepts.
    """

    name: str
    rows: int
    summary: str
    description: str
    columns: dict[str, str]
    source: str
    citation: str
    synonyms: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.name}: {self.summary}"
        columns = "\n".join(
            fill(f"{name} : {meaning}", 88, initial_indent="    ", subsequent_indent="        ")
            for name, meaning in self.columns.items()
        )
        size = f"{self.rows} rows, {len(self.columns)} columns"
        return "\n".join(
            [
                head,
                "=" * len(head),
                fill(self.description, 88),
                "",
                f"{size}:",
                columns,
                "",
                fill(f"Source: {self.source}", 88, subsequent_indent="    "),
                fill(f"Cite: {self.citation}", 88, subsequent_indent="    "),
            ]
        )

    __repr__ = __str__


DATASETS = (
    DatasetInfo(
        name="sleepstudy",
        rows=180,
        summary="reaction time over ten days of a study of sleep deprivation, 18 subjects",
        description=(
            "Average reaction time per day of the most sleep-deprived group (three hours in bed) "
            "of the study, for its first ten days. Days 0 and 1 were adaptation and training, "
            "day 2 was baseline. Balanced: every subject has all ten days."
        ),
        columns={
            "Reaction": "average reaction time (ms)",
            "Days": "day of the study, 0 to 9 (days)",
            "Subject": "subject, 18 levels",
        },
        source="R package lme4 1.1-31, sleepstudy.",
        citation=(
            "Belenky, G. et al. (2003). Patterns of performance degradation and restoration during "
            "sleep restriction and subsequent recovery: a sleep dose-response study. Journal of "
            "Sleep Research 12, 1-12."
        ),
    ),
    DatasetInfo(
        name="Dyestuff",
        rows=30,
        summary="yield of dyestuff from six batches, balanced one-way layout",
        description=(
            "Yield of the dyestuff Naphthalene Black 12B from five preparations of each of six "
            "batches of an intermediate product; asks how much of the variation is between batches."
        ),
        columns={
            "Batch": "batch of the intermediate product, 6 levels",
            "Yield": "yield (grams of standard colour)",
        },
        source="R package lme4 1.1-31, Dyestuff.",
        citation=f"{DAVIES_GOLDSMITH}, section 6.4.",
    ),
    DatasetInfo(
        name="Dyestuff2",
        rows=30,
        summary="made-up yields whose between-batch variance is estimated as zero",
        description=(
            "Data in the layout of Dyestuff, constructed so that the mean square between batches "
            "is below the one within: ML and REML estimate the between-batch variance as exactly 0."
        ),
        columns={
            "Batch": "batch, 6 levels",
            "Yield": "simulated yield (arbitrary units)",
        },
        source="R package lme4 1.1-31, Dyestuff2.",
        citation=(
            "Box, G. E. P. and Tiao, G. C. (1973). Bayesian Inference in Statistical Analysis. "
            "Addison-Wesley, section 5.1.2."
        ),
    ),
    DatasetInfo(
        name="Penicillin",
        rows=144,
        summary="growth inhibition by six samples on 24 plates, fully crossed",
        description=(
            "Six samples of penicillin tested by the B. subtilis plate method, each once on each "
            "of 24 plates: two completely crossed random factors."
        ),
        columns={
            "diameter": "diameter of the zone of growth inhibition (mm)",
            "plate": "assay plate, 24 levels",
            "sample": "penicillin sample, 6 levels",
        },
        source="R package lme4 1.1-31, Penicillin.",
        citation=f"{DAVIES_GOLDSMITH}, section 6.6.",
    ),
    DatasetInfo(
        name="Pastes",
        rows=60,
        summary="strength of a paste, casks nested in delivery batches",
        description=(
            "Three casks from each of ten delivery batches, two assays per cask. The labels of "
            "cask repeat across batches; sample is the unambiguous batch:cask."
        ),
        columns={
            "strength": "strength of the paste (assay units)",
            "batch": "delivery batch, 10 levels",
            "cask": "cask within the batch, 3 levels",
            "sample": "batch:cask, 30 levels",
        },
        source="R package lme4 1.1-31, Pastes.",
        citation=f"{DAVIES_GOLDSMITH}, section 6.5.",
    ),
    DatasetInfo(
        name="cake",
        rows=270,
        summary="breakage angle of chocolate cakes, split-plot with an ordered factor",
        description=(
            "Cakes of three recipes baked at six temperatures. A replicate of a recipe is the "
            "whole plot, the cakes baked from it at each temperature are the sub-plots; replicate "
            "labels repeat across recipes."
        ),
        columns={
            "replicate": "replicate within the recipe, 15 levels, in order of time",
            "recipe": "recipe, 3 levels",
            "temperature": "baking temperature, ordered factor with 6 levels (degrees Fahrenheit)",
            "angle": "angle at which the cake broke (degrees)",
            "temp": "baking temperature as a number (degrees Fahrenheit)",
        },
        source="R package lme4 1.1-31, cake.",
        citation=(
            "Cook, F. E. (1938). Chocolate cake, I. Optimum baking temperature. Master's thesis, "
            "Iowa State College; in Cochran, W. G. and Cox, G. M. (1957). Experimental Designs, "
            "2nd ed. Wiley, p. 300."
        ),
    ),
    DatasetInfo(
        name="InstEval",
        rows=73421,
        summary="lecture ratings at ETH Zurich, students and lecturers partly crossed",
        description=(
            "Each row is one student's rating of one lecturer's course in a past semester. "
            "Students and lecturers are partly crossed; anonymised."
        ),
        columns={
            "s": "student, 2972 levels",
            "d": "lecturer, 1128 levels",
            "studage": "semesters since the student enrolled, ordered factor 2, 4, 6, 8",
            "lectage": "semesters since the lecture took place, ordered factor 1 to 6",
            "service": "1 if held for another department than the lecturer's own, else 0",
            "dept": "department of the lecture, 14 levels, codes are random",
            "y": "rating, 1 (poor) to 5 (very good)",
        },
        source="R package lme4 1.1-31, InstEval.",
        citation=(
            "ETH Zurich, in Bates, D., Maechler, M., Bolker, B. and Walker, S. (2015). Fitting "
            "linear mixed-effects models using lme4. Journal of Statistical Software 67(1)."
        ),
    ),
    DatasetInfo(
        name="Orthodont",
        rows=108,
        summary="orthodontic growth of 27 children at ages 8, 10, 12 and 14",
        description=(
            "Distance between two points of the skull read from X-rays, for 16 boys and 11 girls, "
            "every two years. Balanced and complete."
        ),
        columns={
            "distance": "distance from pituitary to pterygomaxillary fissure (mm)",
            "age": "age (years)",
            "Subject": "child, 27 levels, by increasing mean distance within sex",
            "Sex": "Male or Female",
        },
        source="R package nlme 3.1-162, Orthodont.",
        citation=(
            "Potthoff, R. F. and Roy, S. N. (1964). A generalized multivariate analysis of "
            "variance model useful especially for growth curve problems. Biometrika 51, 313-326."
        ),
    ),
    DatasetInfo(
        name="Machines",
        rows=54,
        summary="productivity of six workers on three machines, three replicates",
        description=(
            "Six randomly chosen workers operated each of three machines three times; the score "
            "combines number and quality of the pieces produced."
        ),
        columns={
            "Worker": "worker, 6 levels, by increasing highest score",
            "Machine": "machine, 3 levels",
            "score": "productivity score (points)",
        },
        source="R package nlme 3.1-162, Machines.",
        citation=PINHEIRO_BATES,
    ),
    DatasetInfo(
        name="Oxboys",
        rows=234,
        summary="heights of 26 boys from Oxford on nine occasions",
        description=(
            "Height against a standardised age. The ages differ slightly between boys; Occasion "
            "numbers the visits, so that the data can also be treated as balanced."
        ),
        columns={
            "Subject": "boy, 26 levels, by increasing greatest height",
            "age": "age, centred and scaled (dimensionless)",
            "height": "height (cm)",
            "Occasion": "visit, ordered factor 1 to 9",
        },
        source="R package nlme 3.1-162, Oxboys.",
        citation=(
            "Goldstein, H. (1987). Multilevel Models in Educational and Social Research. Oxford "
            f"University Press; in {PINHEIRO_BATES}"
        ),
    ),
    DatasetInfo(
        name="Oats",
        rows=72,
        summary="yield of oats, split-plot of nitrogen within variety in six blocks",
        description=(
            "Three varieties were assigned at random to the plots of each block, four nitrogen "
            "concentrations to the sub-plots of each plot."
        ),
        columns={
            "Block": "block, 6 levels, by increasing highest yield",
            "Variety": "variety, 3 levels; a whole plot is Block:Variety",
            "nitro": "nitrogen concentration (cwt/acre)",
            "yield": "yield (bushels/acre)",
        },
        source="R package nlme 3.1-162, Oats.",
        citation=(
            "Yates, F. (1935). Complex experiments. Supplement to the Journal of the Royal "
            f"Statistical Society 2, 181-247; in {PINHEIRO_BATES}"
        ),
    ),
    DatasetInfo(
        name="Rail",
        rows=18,
        summary="travel time of an ultrasonic wave in six rails, three readings each",
        description="Six railway rails chosen at random and each tested three times.",
        columns={
            "Rail": "rail, 6 levels, by increasing travel time",
            "travel": "zero-force travel time (nanoseconds)",
        },
        source="R package nlme 3.1-162, Rail.",
        citation=(
            "Devore, J. L. (2000). Probability and Statistics for Engineering and the Sciences, "
            f"5th ed. Duxbury; in {PINHEIRO_BATES}"
        ),
    ),
    DatasetInfo(
        name="MathAchieve",
        rows=7185,
        summary="mathematics achievement of 7185 pupils in 160 schools",
        description=(
            "A sub-sample of the 1982 High School and Beyond survey. Sector was merged from the "
            "school file; cses is SES - MEANSES."
        ),
        columns={
            "School": "school, 160 levels, by increasing highest achievement",
            "Minority": "whether the pupil belongs to a racial minority, No or Yes",
            "Sex": "Male or Female",
            "SES": "socio-economic status (standardised score)",
            "MathAch": "mathematics achievement (test score)",
            "MEANSES": "mean SES of the school (standardised score)",
            "Sector": "Public or Catholic",
            "cses": "SES centred at MEANSES (standardised score)",
        },
        source="R package nlme 3.1-162, MathAchieve and MathAchSchool.",
        citation=(
            "Raudenbush, S. W. and Bryk, A. S. (2002). Hierarchical Linear Models, 2nd ed. Sage; "
            f"in {PINHEIRO_BATES}"
        ),
    ),
    DatasetInfo(
        name="Ovary",
        rows=308,
        summary="number of large ovarian follicles in 11 mares through the cycle",
        description=(
            "Daily counts from three days before an ovulation until three days after the next one; "
            "time is scaled so that the ovulations of every mare fall at 0 and 1."
        ),
        columns={
            "Mare": "mare, 11 levels, by increasing highest count",
            "Time": "time in the oestrous cycle (fraction of a cycle)",
            "follicles": "follicles over 10 mm in diameter (count)",
        },
        source="R package nlme 3.1-162, Ovary.",
        citation=(
            "Pierson, R. A. and Ginther, O. J. (1987). Follicular population dynamics during the "
            "estrous cycle of the mare. Animal Reproduction Science 14, 219-231."
        ),
    ),
    DatasetInfo(
        name="BodyWeight",
        rows=176,
        summary="weight of 16 rats on three diets over 64 days",
        description=(
            "Weights on days 1, 8, ..., 64 with one more on day 44. The diet groups start at "
            "very different weights and differ in variance."
        ),
        columns={
            "weight": "body weight (g)",
            "Time": "time since the start of the diet (days)",
            "Rat": "rat, 16 levels, those of one diet side by side",
            "Diet": "diet, 3 levels",
        },
        source="R package nlme 3.1-162, BodyWeight.",
        citation=(
            "Crowder, M. and Hand, D. (1990). Analysis of Repeated Measures. Chapman and Hall; "
            f"in {PINHEIRO_BATES}"
        ),
    ),
    DatasetInfo(
        name="ergoStool",
        rows=36,
        summary="effort to arise from four types of stool, nine subjects",
        description="Nine subjects each tried four types of ergonomic stool once.",
        columns={
            "effort": "effort required to arise (Borg scale)",
            "Type": "type of stool, 4 levels",
            "Subject": "subject, 9 levels, by increasing mean effort",
        },
        source="R package nlme 3.1-162, ergoStool.",
        citation=PINHEIRO_BATES,
    ),
    DatasetInfo(
        name="ratpup",
        rows=322,
        summary="birth weight of 322 rat pups in 27 litters under three treatments",
        description=(
            "Thirty females were assigned at random to control, low or high dose of a compound; "
            "27 litters survived. Treatment varies between litters, sex within."
        ),
        columns={
            "weight": "birth weight (g)",
            "sex": "Male or Female",
            "Litter": "litter, 27 levels, those of one treatment side by side",
            "Lsize": "size of the litter (pups)",
            "Treatment": "Control, Low or High",
        },
        source="R package nlme 3.1-162, RatPupWeight.",
        citation=(
            "Dempster, A. P., Selwyn, M. R., Patel, C. M. and Roth, A. J. (1984). Statistical and "
            "computational aspects of mixed model analysis. Applied Statistics 33, 203-214; "
            f"in {PINHEIRO_BATES}"
        ),
        synonyms=("RatPupWeight",),
    ),
    DatasetInfo(
        name="ChickWeight",
        rows=578,
        summary="weight of 50 chicks on four diets to day 21, some drop out",
        description=(
            "Weights at birth, every second day until day 20, and on day 21. Five chicks have an "
            "incomplete record."
        ),
        columns={
            "weight": "body weight (g)",
            "Time": "time since birth (days)",
            "Chick": "chick, 50 levels, by increasing final weight within diet",
            "Diet": "diet, 4 levels",
        },
        source="R 4.2.2, package datasets, ChickWeight.",
        citation=(
            "Crowder, M. and Hand, D. (1990). Analysis of Repeated Measures. Chapman and Hall, "
            "example 5.3."
        ),
    ),
    DatasetInfo(
        name="houses",
        rows=80,
        summary="house price on floor area, a plain linear model (simulated)",
        description="price = 50000 + 135 sqft + e with e ~ N(0, 28000^2), independent.",
        columns={
            "price": "price (dollars)",
            "sqft": "floor area (square feet)",
        },
        source=SIMULATED,
        citation=SIMULATED_CITATION,
        synonyms=("sim_houses",),
    ),
    DatasetInfo(
        name="schools",
        rows=493,
        summary="test scores of pupils in 24 schools of unequal size (simulated)",
        description=(
            "score = 52 + 2.1 hours + u + e, with u ~ N(0, 6^2) per school and e ~ N(0, 8^2); "
            "8 to 35 pupils a school."
        ),
        columns={
            "score": "test score (points)",
            "hours": "time spent studying (hours)",
            "school": "school, 24 levels",
        },
        source=SIMULATED,
        citation=SIMULATED_CITATION,
        synonyms=("sim_schools",),
    ),
    DatasetInfo(
        name="weights",
        rows=900,
        summary="weight of 100 patients in three groups over two years (simulated)",
        description=(
            "Every patient has an own baseline and an own rate of change: random intercept with "
            "SD 12, random slope with SD 0.30 per month, correlation 0.25, residual SD 1.8. Mean "
            "slopes are 0.02 (Control), -0.25 (Low) and -0.55 (High) per month."
        ),
        columns={
            "patient": "patient, 100 levels",
            "group": "Control, Low or High",
            "month": "time since the start, every third month to 24 (months)",
            "weight": "body weight (kg)",
        },
        source=SIMULATED,
        citation=SIMULATED_CITATION,
        synonyms=("sim_weights",),
    ),
    DatasetInfo(
        name="simpson",
        rows=200,
        summary="Simpson's paradox: slopes within and between groups disagree (simulated)",
        description=(
            "Eight groups of 25. The slope of y on x is -1.5 within every group and +3 between "
            "the group means, so pooling the groups turns the sign."
        ),
        columns={
            "g": "group, 8 levels",
            "x": "predictor (arbitrary units)",
            "y": "response (arbitrary units)",
        },
        source=SIMULATED,
        citation=SIMULATED_CITATION,
        synonyms=("sim_simpson",),
    ),
)
