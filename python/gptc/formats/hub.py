"""Models by their names on the Hugging Face hub, through its own client (huggingface_hub).

Files come into the hub's cache, where other programs find them too; the client resumes what was cut
off and compares checksums. HF_ENDPOINT names another server, HF_HUB_OFFLINE forbids asking any.
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from pathlib import Path

from gptc.errors import GptcError
from gptc.files.words import pip_install
from gptc.formats import pickled
from gptc.formats.safetensors import has_tensors
from gptc.tokenizer import folder

# Weights in safetensors, what describes them, and tokenizers. Weights of PyTorch's follow only if
# there are no others, and PyTorch is here.
_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *folder.NAMES,
    folder.MORE_TEMPLATES,
    "*.model",
    "gptc_tokenizer.json",
]
_PICKLED = ["pytorch_model*.bin", pickled.INDEX]


def is_name(name: str) -> bool:
    """Whether this can be the name of a model of the hub: NAME or OWNER/NAME."""
    return re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name) is not None


def fetch(name: str) -> Path:
    """The folder of a model in the cache, after downloading what is missing.

    GptcError when the model, the network or the client is missing.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise GptcError(
            f"{_not_here(name)} To download a model of that name from the Hugging Face hub: "
            + pip_install("huggingface_hub")
        ) from None
    try:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
        if not has_tensors(found) and pickled.is_available():
            huggingface_hub.snapshot_download(name, allow_patterns=_PICKLED)
        return found
    except errors.RepositoryNotFoundError:
        why = "the hub knows no such model, or it asks for a login"
    except errors.LocalEntryNotFoundError:
        why = "it is not in the cache, and the hub cannot be reached"
    except errors.HfHubHTTPError as error:
        why = str(error).splitlines()[0]
    except OSError as error:
        why = error.strerror or str(error).splitlines()[0]
    except ValueError as error:
        why = str(error).splitlines()[0]
    raise GptcError(f"{_not_here(name)} Nor can a model of that name be downloaded: {why}")


def _not_here(name: str) -> str:
    """The error about a missing path, with the name in its folder that may be meant."""
    path, names = Path(name), list[str]()
    with suppress(OSError):
        names = [other.name for other in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    what = f"did you mean {path.parent / close[0]}?" if close else "check the path."
    return f"{name} does not exist here; {what}"
