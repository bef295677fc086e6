"""Check the jobs of a sweep before the first one starts."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from hydra.errors import ConfigCompositionException

from fpn_ablate.config.factors import flatten, under
from fpn_ablate.config.parts import TimmBackbone
from fpn_ablate.config.schema import INCIDENTAL, Coco, Config
from fpn_ablate.runs import identity
from fpn_ablate.store import plan
from fpn_ablate.store.layout import LOCKS
from fpn_ablate.utils.errors import RankFailed, UserError
from fpn_ablate.utils.files import refuse_links_out, unwritable
from fpn_ablate.utils.paths import PICTURES

MIN_FREE_BYTES = 2**16  # bytes that must be free: what a row writes before its weights

# Keys whose values are files and folders, of which names of rows, recipes and data have the last part alone.
PLACES = ("weights", "backbone.weights", "data.root", "data.train", "data.val", "task.proposals.file")
FILES = {key.partition(".")[0] for key in PLACES}


def check_writable(out: str) -> None:
    """Check that runs can be written below `out`, that they stay there, and that there is room for the smallest.

    Raises:
        UserError: they cannot, a folder leads elsewhere, or there is no room.
    """
    runs = Path(out, "runs")
    refuse_links_out(out, *(Path(out, name) for name in ("runs", "backbones", "tables", "plots", "figures")))
    refuse_links_out(out, *(runs / name for name in (plan.PLANS, LOCKS, PICTURES, "multirun.yaml")))  # the last is Hydra's
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs) as file:
            file.write(bytes(MIN_FREE_BYTES))
            file.flush()
            os.fsync(file.fileno())  # a network disk tells of a quota no earlier
    except OSError as error:
        raise UserError(f"out={unwritable(Path(out), error)}, out=FOLDER") from None


def check_launcher(target: str) -> None:
    """Check that the package of a launcher, Hydra's name of its class, is installed.

    Raises:
        UserError: it is not.
    """
    package = target.split(".")[1]
    if target.startswith("hydra_plugins.") and not find_spec(f"hydra_plugins.{package}"):
        extra = package.removeprefix("hydra_").removesuffix("_launcher")
        raise UserError(f'hydra/launcher: {package} is not installed; pip install "fpn-ablate[{extra}]"')


def check_parts(cfg: Config) -> None:
    """Check the parts of a row that are not ours: a backbone of timm, and classes of the user's.

    Raises:
        UserError: timm has no such network, or a part does not do what is asked of it.
    """
    if isinstance(cfg.backbone, TimmBackbone) or cfg.user_parts:
        from fpn_ablate.model import build  # takes seconds, with torch and timm

        build.check(cfg)


def check_inputs(cells: Sequence[Config]) -> None:
    """Check that what these cells read is there, before anything that takes time.

    Raises:
        UserError: a folder or file of data or weights is missing, or does not fit.
    """
    for cfg in cells:
        _check_data(cfg)
    check_weights(cells)


def _check_data(cfg: Config) -> None:
    if isinstance(cfg.data, Coco):
        from fpn_ablate.data.coco import root_of  # loads torch, which takes seconds

        root, data = root_of(cfg.data), cfg.data
        for name, split in (("val", data.val), ("train", data.train)) if cfg.mode == "train" else (("val", data.val),):
            if not (root / split.annotations).is_file():
                raise UserError(
                    f"data.{name}.annotations={split.annotations}: there is no such file below data.root={data.root}; "
                    f"put it there, or give data.{name}.annotations=FILE"
                )


def check_weights(cells: Sequence[Config]) -> None:
    """Read the weights that cells start from, before the first cell starts; ImageNet's are downloaded, once for all cells.

    Raises:
        UserError: weights cannot be downloaded, or a file is missing or does not fit the backbone.
    """
    for cfg in cells:
        if cfg.mode == "evaluate" and not Path(cfg.weights).exists():
            raise UserError(f"weights={cfg.weights}: no such file")
    starts = {cfg.backbone.model_dump_json(): cfg.backbone for cfg in cells if cfg.mode == "train"}
    for backbone in starts.values():
        if backbone.weights not in ("none", "shipped", "pretrain"):
            from fpn_ablate.weights.backbone import backbone_weights  # loads torch, which takes seconds

            try:
                backbone_weights(backbone, None)
            except UserError as error:
                if " does not fit " not in str(error):  # other messages name their fix
                    raise
                raise UserError(f"{error}; give a file of this backbone, or the backbone that the file is of") from None


def reject_duplicate_rows(cells: Sequence[Config]) -> None:
    """Refuse two rows with the same configuration, which would fill two lines of a table with one result.

    Raises:
        UserError: two rows are the same, or two files or folders would be one row.
    """
    seen: dict[str, Config] = {}
    named: dict[tuple[str, str, str, str, int], Config] = {}
    for cfg in cells:
        other = named.setdefault((cfg.table, cfg.recipe.name, cfg.data_name, cfg.row, cfg.seed), cfg)
        theirs, ours = ({} if other is cfg else flatten(of.model_dump(include={*FILES})) for of in (other, cfg))
        for key, file in theirs.items():
            if file != ours.get(key) and key in PLACES:
                raise UserError(f"{key}={file} and {ours.get(key)} are both the row {cfg.row}: give one of them another name")
        twin = seen.setdefault(cfg.model_dump_json(exclude={*INCIDENTAL, "row"}), cfg)
        if twin.row != cfg.row:
            raise UserError(f"rows {twin.row} and {cfg.row} are the same configuration: take one of them out")


def reject_unfair_rows(cells: Sequence[Config]) -> None:
    """Refuse rows of one table that differ in more than its declared factors: the table would refuse them after training.

    Raises:
        UserError: it names the keys and the rows.
    """
    tables: dict[tuple[str, str, str], dict[str, list[Config]]] = {}
    for cfg in cells:
        table = tables.setdefault((cfg.table, cfg.recipe.name, cfg.data_name), {})
        table.setdefault(identity.config_key(cfg), []).append(cfg)
    for (table, recipe, data), groups in tables.items():
        if len(groups) > 1:
            from fpn_ablate.report.collate.choose import unfair_message  # loads pandas

            names = {"table": table, "recipe": recipe, "data": data}
            records = [[flatten({**names, "row": c.row, "config": identity.portable(c)}) for c in g] for g in groups.values()]
            raise UserError(unfair_message(records))


def reject_unread_keys(cells: Sequence[Config], overrides: Iterable[str]) -> None:
    """Refuse keys of the RPN on a command line none of whose rows has one: they would change nothing.

    Raises:
        UserError: it names the first of them.
    """
    read = any("rpn.head" in cfg.parts for cfg in cells)
    for key, _, value in () if read else (o.lstrip("+").partition("=") for o in overrides):
        if under(key, ["rpn"]):
            tasks = dict.fromkeys(f"task={cfg.task.name}" for cfg in cells)
            raise UserError(f"{key}={value}: nothing reads it, as {' and '.join(tasks)} has no RPN; take it out")


class HydraUserError(ConfigCompositionException):
    """An error that Hydra prints without a traceback."""


@contextmanager
def as_hydra_error(exit_on_error: bool = False) -> Iterator[None]:
    """Re-raise an error that needs no traceback as `HydraUserError`; with `exit_on_error`, print it and exit (2: bad input)."""
    try:
        yield
    except (UserError, RankFailed) as error:
        if exit_on_error:
            print(error, file=sys.stderr)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise HydraUserError(str(error)) from None
