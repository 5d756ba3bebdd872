"""From the `model` part of a configuration to the object, through the same parser as the command line."""

from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from kvc.core.module import KvcModule
from kvc.errors import UserError
from kvc.messages import one_sentence


class _Parser(ArgumentParser):
    """Parser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_sentence(message)) from ex


def build_model(model_config: dict[str, Any]) -> KvcModule:
    """Build a method or an evaluation.

    Args:
        model_config: `class_path` and `init_args`, as in `config.yaml`; nested dataclasses as plain dicts.

    Returns:
        The object, with the weights of its base model and untrained parts of its own.

    Raises:
        UserError: If the class cannot be imported, an argument is wrong, or the base model cannot be loaded.
    """
    parser = _Parser()
    parser.add_subclass_arguments(KvcModule, "model", fail_untyped=False, required=True)
    config = parser.parse_object({"model": model_config})
    try:
        model = parser.instantiate(config).model
    except UserError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"model {model_config.get('class_path')} cannot be built: {error}") from error
    assert isinstance(model, KvcModule)
    return model
