"""An engine's virtual environment is made once, and again when its recipe changes."""

from __future__ import annotations

from pathlib import Path

from lab.engines.environment import made


def test_a_changed_recipe_is_noticed(tmp_path: Path) -> None:
    """A stub that lacked what it has today was taken for the one of the recipe: only the version was compared."""
    recipe, installed = tmp_path / "recipe.py", list[tuple[Path, Path]]()
    recipe.write_text("one")

    def make() -> Path:
        return made(tmp_path / "venv", (recipe,), lambda python, packages: installed.append((python, packages)))

    python = make()
    assert make() == python
    assert len(installed) == 1
    assert python.exists()
    assert installed[0][1].is_dir()
    recipe.write_text("two")
    make()
    assert len(installed) == 2
