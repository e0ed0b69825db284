"""The embedded demo: a small cohort of synthetic H&E slides, made on first use and kept outside the repository."""

from tasks.common.files import cache_folder
from tasks.wsi_mil.demo.cohort import DemoCohort, make_cohort

__all__ = ["DemoCohort", "cache_folder", "make_cohort"]
