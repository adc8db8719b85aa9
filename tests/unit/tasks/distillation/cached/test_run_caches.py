"""Which teachers are caches, which nothing opens before it is asked for."""

from __future__ import annotations

import pytest

from fd_large.errors import CacheError, ConfigError
from fd_large.tasks.distillation.cached.run_caches import RunCaches
from fd_large.tasks.distillation.section import NamedTeacher


def test_a_cache_is_opened_when_it_is_asked_for_and_not_stored_again(tmp_path):
    models = {"shown": NamedTeacher(model="dino_vit_base_patch16", source="random")}
    assert not RunCaches(models)
    assert RunCaches(models).blank_maps(3) is None
    caches = RunCaches({**models, "stored": NamedTeacher(source=f"cached:{tmp_path}")})
    assert caches
    assert "shown" not in caches
    assert caches.folders == {"stored": tmp_path}
    with pytest.raises(ConfigError, match=r"no teacher whose maps .*--teachers\.stored"):
        caches.check("stored", also_stored="elsewhere")
    with pytest.raises(CacheError, match=r"--teachers\.stored\.source"):
        caches.check("stored", also_stored="")
