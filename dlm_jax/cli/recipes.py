"""Finding and loading recipes: Python files whose `get_config()` returns an ml_collections.ConfigDict."""

import importlib.util
import pathlib

import ml_collections

from dlm_jax.cli.config import to_config_dict
from dlm_jax.cli.values import hint
from dlm_jax.errors import ConfigError

_PACKAGE = pathlib.Path(__file__).parents[1]


def train_defaults() -> ml_collections.ConfigDict:
    """Every key of a training run at its default; where a recipe starts."""
    from dlm_jax.training.config import TrainConfig

    return to_config_dict(TrainConfig())


def recipe_folder() -> pathlib.Path:
    """`dlm_jax/configs` where the package is installed, `configs` beside the package in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.py"))


def load_recipe(name_or_file: str) -> ml_collections.ConfigDict:
    """What the recipe's `get_config()` returns; a recipe may call this to start from another.

    Raises:
      ConfigError: there is no such recipe, or it fails.
    """
    path = _find(name_or_file)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"recipe {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {path} fails with {type(error).__name__}: {reason}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"get_config() of recipe {path} returns {type(config).__name__}, not an "
                          "ml_collections.ConfigDict")
    return config


def _find(name_or_file: str) -> pathlib.Path:
    path, names = pathlib.Path(name_or_file).expanduser(), recipe_names()
    if name_or_file in names:
        return recipe_folder() / f"{name_or_file}.py"
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        beside = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
        raise ConfigError(f"there is no recipe file {name_or_file}{hint(name_or_file, beside)}")
    raise ConfigError(f"there is no recipe {name_or_file!r}{hint(name_or_file, names)}: give the path of a file or one "
                      f"of {', '.join(names)}")
