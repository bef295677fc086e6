"""Tables and plots from the records that runs leave on disk. Imports neither torch nor Hydra."""

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load, write_ledger
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.output import save_table, write

__all__ = ["Table", "collate", "load", "save_table", "write", "write_ledger"]
