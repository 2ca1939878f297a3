"""`soar doctor`: a whole run is well; whatever was changed, removed, added or swapped afterwards is named."""

import shutil

from soar.cli import main


def test_a_run_is_well_while_it_runs_and_in_a_study(run, tmp_path, capsys):
    (run / "report.html").write_text("the page may be written again")
    shutil.copytree(run, tmp_path / "study" / "a")
    for name in ("summary.json", "hashes.json"):
        (run / name).unlink()
    shutil.copytree(run, tmp_path / "study" / "b")
    assert main(["doctor", str(tmp_path / "study")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "all 8 checks are well" in lines
    assert "not found by this: changes of somebody who wrote hashes.json" in lines[-1]
    assert "ok   a: config of the newest checkpoint" in lines
    assert "ok   b: no summary.json: the run is not finished" in lines
    assert main(["doctor", str(tmp_path / "study" / "a" / "hard")]) == 1
    assert "no run folder: it has no manifest.json" in capsys.readouterr().err
