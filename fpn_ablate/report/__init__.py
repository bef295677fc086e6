"""Tables and plots from the records that runs leave on disk. Imports neither torch nor Hydra."""

from fpn_ablate.report.collate import Table, collate
from fpn_ablate.report.output import save_table, write
from fpn_ablate.report.records import load, write_ledger

__all__ = ["Table", "collate", "load", "save_table", "write", "write_ledger"]
