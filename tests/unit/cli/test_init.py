"""The Slurm scripts in a folder of the user's: complete, and theirs to edit."""

import subprocess

import pytest

from fd_large import shipped
from fd_large.cli import init
from fd_large.errors import ConfigError


def test_the_scripts_are_written_once(tmp_path, capsys):
    folder = tmp_path / "cluster"
    assert init.main([str(folder)]) == 0
    said = capsys.readouterr().out
    written = {path.name: path for path in folder.iterdir()}
    assert {"fd_vit.sh", "fd_swinv2g.sh", "resume.sh", "launch.sh", "site.sh"} <= written.keys()
    assert "throughput.sh" not in written
    for name, path in written.items():
        assert path.read_text() == (shipped.folder("slurm") / name).read_text()
        assert name in said
    with pytest.raises(ConfigError, match=r"init: .*ade20k_swinv2g"):
        init.main([str(folder)])


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "photograph.png").touch()
    with pytest.raises(ConfigError, match=r"got photograph\.png"):
        init.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["photograph.png"]
    (tmp_path / "photograph.png").rename(tmp_path / ".git")
    assert init.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(("number", "told"), [(5, "4, expected"), (7, "4 and 2 more, expected")])
def test_five_of_its_files_are_named(tmp_path, number, told):
    for name in range(number):
        (tmp_path / str(name)).touch()
    with pytest.raises(ConfigError, match=f"got 0, 1, 2, 3, {told}"):
        init.main([str(tmp_path)])


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="init: "):
        init.main([str(tmp_path / "file" / "folder")])


def test_elsewhere_the_scripts_say_where_they_belong(tmp_path):
    script = shipped.folder("slurm") / "fd_vit.sh"
    ended = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "expected the folder of launch.sh" in ended.stderr
