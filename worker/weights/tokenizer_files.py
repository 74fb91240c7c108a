"""What a gateway needs of a model's tokenizer: its JSON, its special tokens and its chat
template."""

from dataclasses import dataclass
from typing import Any

from worker.weights.files import ModelFilesError, ModelFolder


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """As they go into the model card; what a model does not have is empty."""

    tokenizer_json: str
    bos_token: str
    eos_token: str
    chat_template: str
    prompt_style: str = ""  # the rest is for `worker/models/text_style.py` to say
    keeps_special_tokens: bool = False


def read_tokenizer_files(folder: ModelFolder) -> TokenizerFiles:
    """Read them. Raises ModelFilesError if there is no tokenizer."""
    config = folder.json("tokenizer_config.json")
    special = folder.json("special_tokens_map.json")
    return TokenizerFiles(
        tokenizer_json=_tokenizer_json(folder),
        bos_token=_token_text(config.get("bos_token") or special.get("bos_token")),
        eos_token=_token_text(config.get("eos_token") or special.get("eos_token")),
        chat_template=_chat_template(folder, config),
    )


def _tokenizer_json(folder: ModelFolder) -> str:
    path = folder.path / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    # Only the files of a slow tokenizer: transformers knows how to rebuild each kind. Slow to
    # import, so only now.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ModelFilesError(
            f"{folder.path} has no tokenizer.json, nor what makes one: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelFilesError(
            f"the tokenizer in {folder.path} cannot be written as a tokenizer.json"
        )
    return tokenizer.backend_tokenizer.to_str()


def _token_text(token: Any) -> str:
    """A token is stored as its text, or as an object with its text as `content`."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return str(token or "")


def _chat_template(folder: ModelFolder, config: dict[str, Any]) -> str:
    path = folder.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = (
        config.get("chat_template") or folder.json("chat_template.json").get("chat_template") or ""
    )
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        return str(named.get("default", ""))
    return str(template)
