"""DeepSpeed's configurations and the Slurm scripts are found by name, wherever the package lies."""

import pytest

from fd_large import shipped
from fd_large.errors import ConfigError


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    own = tmp_path / "zero3"
    own.write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert shipped.deepspeed_config("zero3").resolve() == own


@pytest.mark.parametrize("given", ["zero3", "ds_configs/zero3.json", "zero3.json"])
def test_a_name_is_the_file_that_travels_with_the_package(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.deepspeed_config(given) == shipped.folder("ds_configs") / "zero3.json"
    # Installed, the files are inside of the package.
    inside = tmp_path / "fd_large" / "ds_configs"
    inside.mkdir(parents=True)
    (inside / "zero3.json").write_text("{}")
    monkeypatch.setattr(shipped, "_PACKAGE", inside.parent)
    assert shipped.deepspeed_config(given) == inside / "zero3.json"


@pytest.mark.parametrize("given", ["zero4", "/no/such.json", ""])
def test_another_is_told_with_the_names(given):
    with pytest.raises(ConfigError, match=r"--deepspeed_config: .* zero3"):
        shipped.deepspeed_config(given)
