"""`redone report`: render a run folder's report.html again."""

from __future__ import annotations

from pathlib import Path


def report(folder: Path) -> int:
    """Raises RunFolderError when `folder` is not of a run, or of one of another schema version."""
    from redone.config.versions import check_run_folder
    from redone.record.report import write_report
    from redone.record.summary import read_summary
    from redone.record.table import print_result

    check_run_folder(folder)
    path = write_report(folder)
    if (folder / "summary.json").is_file():
        print_result(read_summary(folder / "summary.json"))
    print(path)
    return 0
