"""
A run on Weights & Biases: a wandb run for each arm, in one group, over the arm's own steps.
"""
import json
import uuid

from configurator import refuse
from sources import DAMAGE


def ids_of(folder):
    """The ids that the run in `folder` goes on in, or None if it was not shown to wandb before."""
    path = folder / "wandb.json"
    try:
        return dict(group="" + json.loads(path.read_bytes())["group"]) if path.exists() else None
    except DAMAGE as error:
        refuse(f"{path} is damaged ({type(error).__name__}); delete it, to go on in new runs of wandb")


class Tracker:
    """Shows rows to wandb. mode: "online" | "offline". folder: the run's. ids: {"group": name of the group},
    of a run that is gone on with. Refuses what wandb cannot do."""

    def __init__(self, mode, folder, settings, stage, ids=None):
        self.mode, self.folder, self.settings, self.stage, self.arm = mode, folder, settings, stage, None
        try:
            import wandb
        except ImportError:
            refuse(f"wandb_log={mode!r} needs the package: pip install wandb")
        self.wandb, self.ids = wandb, ids or dict(group=f"{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.begin("meta")

    def begin(self, arm):
        """The wandb run of an arm."""
        if self.arm:
            self.run.finish()
        self.arm, group = arm, self.ids["group"]
        try:
            self.run = self.wandb.init(
                project="metalearn", group=group, id=f"{group}-{arm}", job_type=arm,
                name=f"{self.folder.name} {arm}", tags=[self.stage, self.settings["dataset"]],
                config=self.settings, mode=self.mode, dir=self.folder.parent, resume="allow",
                reinit="finish_previous")
        except Exception as error:  # no account, no network: wandb has its own kinds for each
            refuse(f"wandb_log={self.mode!r} could not start ({type(error).__name__}): `wandb login`, or use "
                   "--wandb_log=offline")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, row):
        if row["arm"] != self.arm:
            self.begin(row["arm"])
        self.run.log({name: value for name, value in row.items() if isinstance(value, (int, float))})

    def finish(self, arms=None):
        """Ends, with what the run left as an artifact; arms: of a summary, shown as a table."""
        if arms:
            columns = [k for k, v in next(iter(arms.values())).items() if not isinstance(v, list)]
            rows = [[name, *(arm[k] for k in columns)] for name, arm in arms.items()]
            self.run.log({"arms": self.wandb.Table(columns=["arm", *columns], data=rows)})
            left = self.wandb.Artifact(f"{self.ids['group']}-report", type="report")
            for name in ("report.html", "curves.png", "samples.txt", "summary.json"):
                if (self.folder / name).is_file():
                    left.add_file(str(self.folder / name))
            if (self.folder / "hacks").is_dir():
                left.add_dir(str(self.folder / "hacks"), name="hacks")
            self.run.log_artifact(left)
        self.run.finish()
