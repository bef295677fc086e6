"""`python -m fpn_ablate new`: a part of one's own to begin with."""

import importlib.util

import pytest

from fpn_ablate.runs import run as running


@pytest.mark.parametrize("kind", ["neck", "backbone", "head"])
def test_the_part_runs_at_once_and_keeps_its_contract(cli, tmp_path, monkeypatch, kind):
    code, out, err = cli("new", kind, "my_part", "mine/deeper")
    assert (code, err) == (0, "")
    assert "python -m fpn_ablate --config-dir mine/deeper ablation=my_part recipe=smoke" in out
    started = []
    monkeypatch.setattr(running, "run", lambda cfg, number, wait: started.append(cfg))
    assert cli("--config-dir", "mine/deeper", "ablation=my_part", "recipe=smoke", "device=cpu")[0] == 0
    (cfg,) = started
    assert [part.class_ for part in cfg.user_parts.values()] == ["my_part.MyPart"]
    spec = importlib.util.spec_from_file_location("written", tmp_path / "mine" / "deeper" / "my_part_test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.test_the_part_keeps_its_contract()


def test_nothing_is_overwritten(cli, tmp_path):
    assert cli("new", "neck", "pan", "mine")[0] == 0
    file = tmp_path / "mine" / "pan.py"
    file.write_text("mine")
    (tmp_path / "mine" / "neck" / "pan.yaml").unlink()
    code, out, err = cli("new", "neck", "pan", "mine")
    assert (code, out) == (2, "") and err.startswith("nothing written: mine/pan.py, mine/ablation/pan.yaml, ")
    assert file.read_text() == "mine" and not (tmp_path / "mine" / "neck" / "pan.yaml").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fpn", "fpn: there is a built-in ablation=fpn"),
        ("single_level", "single_level: there is a built-in neck=single_level"),
        ("My-Neck", "My-Neck: give a name of small letters, digits and _"),
        ("../x", "../x: give a name"),
        ("class", "class: give a name"),
    ],
)
def test_a_name_that_cannot_be_is_refused(cli, tmp_path, name, message):
    code, out, err = cli("new", "neck", name, "mine")
    assert (code, out) == (2, "") and err.startswith(message)
    assert not list(tmp_path.iterdir())
